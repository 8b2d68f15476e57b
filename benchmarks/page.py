# Licensed under the Apache License, Version 2.0; see LICENSE.
"""RESULTS.md: sections of a table, a text and notes. What a run did not measure stays as an earlier one left it."""

MACHINES = "Machines"
LAST = ("A GPU, by arithmetic", MACHINES)


class Page:
    """The page at a path; empty where there is none, or where the path is None."""

    def __init__(self, path=None):
        text = path.read_text() if path is not None and path.exists() else ""
        parts = (part.partition("\n") for part in f"\n{text}".split("\n## ")[1:])
        self.sections = {title: body.strip("\n") for title, _, body in parts}  # {title: body}

    def put(self, title, heads, rows, text, notes=None, names=1):
        """Write a section and print its new lines.

        heads: the titles of the columns. rows: lists of cells; the first `names` cells name the row. notes: {part:
        verdict}. Rows and notes of the same name are replaced; the others stay, unless the columns have changed.
        """
        new = [table([heads, *rows]), "".join(f"- {part}: {note}\n" for part, note in (notes or {}).items())]
        print(f"\n{title}\n\n" + "\n".join(new), flush=True)
        old_rows, kept = self._rows(title), {}
        if old_rows and old_rows[0] == heads:
            kept = {tuple(row[:names]): row for row in old_rows[1:]}
            notes = {**self._notes(title), **(notes or {})}
        kept.update({tuple(row[:names]): row for row in rows})
        body = [table([heads, *kept.values()]), text.strip("\n") + "\n"]
        body += ["".join(f"- {part}: {note}\n" for part, note in notes.items())] if notes else []
        self.sections[title] = "\n".join(body).strip("\n")

    def put_machine(self, parts, machine):
        """Write where some parts were measured; parts of one machine and commit stand in one line."""
        by_part = {**self._machines(), **dict.fromkeys(parts, machine)}
        lines = {}
        for part, text in by_part.items():
            lines.setdefault(text, []).append(part)
        self.sections[MACHINES] = "".join(f"- {', '.join(names)}: {text}\n" for text, names in lines.items()).strip()

    def machine(self, part):
        return self._machines().get(part, "")

    def _machines(self):
        return {part: text for parts, text in self._notes(MACHINES).items() for part in parts.split(", ")}

    def cells(self, title):
        """{a row's first cell, or its first two joined by a comma, or three: {column: cell}} of a section's table."""
        heads, *rows = self._rows(title) or [[]]
        found = {}
        for row in rows:
            for names in range(1, min(4, len(row))):
                found.setdefault(", ".join(row[:names]), dict(zip(heads, row)))
        return found

    def text(self, opening):
        order = [t for t in self.sections if t not in LAST] + [t for t in LAST if t in self.sections]
        return "\n\n".join([opening.strip("\n"), *(f"## {title}\n\n{self.sections[title]}" for title in order)]) + "\n"

    def _rows(self, title):
        lines = [line for line in self.sections.get(title, "").splitlines() if line.startswith("|")]
        return [[c.strip() for c in line.strip("|").split("|")] for line in lines if not line.startswith("|---")]

    def _notes(self, title):
        lines = [line[2:].partition(": ") for line in self.sections.get(title, "").splitlines() if line[:2] == "- "]
        return {part: note for part, _, note in lines}


def table(rows):
    """Markdown of a table; the first row is the columns' titles."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])
