# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prepared data as rows of ids and labels, in an order that a seed decides."""

import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from paddlemix.models.emu3.tokenization_emu3 import normalized
from paddlemix.utils import InputError, pad_rows, shown

from .prepare_data import schema

IGNORED = -100  # a label that does not count
COLUMNS = ("id", "text", "codes", "height", "width", "response")
LIGHT = ("id", "text", "height", "width", "response", "turns", "error")  # all but the codes: kept in memory
HELD_OUT, SHUFFLED, PROMPTED = range(3)  # what a random number is for


@dataclass(frozen=True)
class Example:
    """One picture with its text. `conversation`: [(question, answer), ...] about it; empty where it is to be drawn."""

    id: str
    text: str
    codes: np.ndarray
    conversation: tuple


@dataclass(frozen=True)
class Row:
    """Token ids and labels of an example, lists of one length."""

    id: str
    ids: list
    labels: list

    @property
    def num_labels(self):
        """Of those that are predicted from a token before."""
        return sum(label != IGNORED for label in self.labels[1:])


class PreparedData:
    """What `emu3 prepare` wrote: Parquet files, and folders of them.

    The texts are in memory. The codes are read once, to check them, and again when they are needed, a row group at a
    time. `digest` is a number that hardly any other data has.

    Args:
        paths: one or several.
        codebook_size: codes are below it.

    Raises:
        InputError: files missing or damaged, columns missing or of other types, doubled ids, empty texts or answers,
            codes that cannot be, no row at all.
    """

    def __init__(self, paths, codebook_size):
        import pyarrow as pa

        self.codebook_size, self.groups, tables = codebook_size, [], []
        for path in map(Path, paths):
            if path.is_dir():
                files = sorted(path.glob("*.parquet"))
            else:
                files = [path] if path.exists() else []
            if not files:
                raise InputError(f"{path}: there is no Parquet file: give what `emu3 prepare` wrote")
            tables += map(self._read_light, files)
        table = pa.concat_tables(tables)
        well = table["error"].is_null()
        self.failed = len(table) - sum(well.to_pylist())
        self.table = table.filter(well)
        self._check()
        self.sizes = np.multiply(*(self.table[name].to_numpy().astype(np.int64) for name in ("height", "width")))
        self.digest = _digest(self.table)
        self._check_codes()

    def __len__(self):
        return len(self.table)

    def _read_light(self, path):
        """The light columns of a file, and where the codes of each row are."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} is not a Parquet file that can be read ({error})") from None
        names = file.schema_arrow.names
        if missing := [name for name in COLUMNS if name not in names]:
            raise InputError(f"{path} has no column {', '.join(missing)}: give what `emu3 prepare` wrote")
        nulls = {name: pa.nulls(file.metadata.num_rows, schema().field(name).type) for name in LIGHT}
        columns = nulls | {name: _read_column(path, file.read, name) for name in LIGHT if name in names}
        groups = range(file.metadata.num_row_groups)
        counts, first = [file.metadata.row_group(i).num_rows for i in groups], len(self.groups)
        self.groups += [(path, i) for i in groups]
        columns["group"] = np.array([first + i for i in groups for _ in range(counts[i])], np.int64)
        columns["place"] = np.array([place for i in groups for place in range(counts[i])], np.int64)
        return pa.table(columns)

    def _check(self):
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(self):
            raise InputError("the data has no row without an error: look at the column `error` of what was prepared")

        def refuse(where, fault):
            if found := self.table["id"].filter(where).to_pylist():
                more = f" and {len(found) - 1} more rows" if len(found) > 1 else ""
                raise InputError(f"row {shown(found[0])}{more} of the data {fault}: mend or remove them")

        def has_hole(turns):
            texts = ((turn or {}).get(name) for turn in turns or () for name in ("text", "response"))
            return any(not (text or "").strip() for text in texts)

        table, empty = self.table, lambda column: pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
        for name in ("id", "text", "height", "width"):
            if table[name].null_count:
                raise InputError(f"{table[name].null_count} rows of the data have no {name}: mend or remove them")
        refuse(empty(table["id"]), "has an empty id")
        refuse(empty(table["text"]), "has an empty text")
        refuse(pc.fill_null(empty(table["response"]), False), "has a picture and a question without an answer")
        turns = table["turns"]
        refuse(pa.array(map(has_hole, turns.to_pylist())), "has a turn without a question or an answer")
        more = pc.fill_null(pc.greater(pc.list_value_length(turns), 0), False)
        refuse(pc.and_(more, table["response"].is_null()), "has turns, and no answer (response) before them")
        refuse(pc.less(pc.min_element_wise(table["height"], table["width"]), 1), "has a height or a width below 1")
        ids = table["id"].to_pandas()
        if len(twice := ids[ids.duplicated()]):
            name = shown(twice.iloc[0])
            raise InputError(f"several rows of the data have the id {name}: give each row its own, and each file once")

    def _check_codes(self):
        """InputError: codes of a row that cannot be. They join the digest."""
        import pyarrow.compute as pc

        places = self.table["place"].to_numpy()
        ends = np.searchsorted(self.table["group"].to_numpy(), np.arange(len(self.groups)), side="right")
        first = 0
        for group, end in enumerate(ends.tolist()):
            codes = self._codes(group)
            values, counts = codes.flatten(), codes.value_lengths().fill_null(0).to_numpy()[places[first:end]]
            bounds = pc.min_max(values).as_py()
            is_in_range = not len(values) or 0 <= bounds["min"] <= bounds["max"] < self.codebook_size
            if values.null_count or not is_in_range or (counts != self.sizes[first:end]).any():
                for index in range(first, end):
                    self.example(index)  # which names the row
            self.digest, first = zlib.crc32(values.to_numpy(zero_copy_only=False), self.digest), end

    def example(self, index):
        """The Example of a row. InputError: codes that cannot be."""
        row = {name: self.table[name][index].as_py() for name in self.table.column_names}
        codes, size = self._codes(row["group"])[row["place"]].values, (row["height"], row["width"])
        codes = np.zeros(0, np.int32) if codes is None else codes.drop_null().to_numpy()
        if codes.size != size[0] * size[1]:
            raise InputError(f"row {shown(row['id'])} has {codes.size} codes for a picture of {size[0]} x {size[1]}")
        if not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise InputError(
                f"row {shown(row['id'])} has codes from {codes.min()} to {codes.max()}, the model's are 0 to "
                f"{self.codebook_size - 1}: prepare the data with the vision tokenizer that belongs to it"
            )
        turns = [] if row["response"] is None else [(row["text"], row["response"])]
        turns += [(turn["text"], turn["response"]) for turn in row["turns"] or []] if turns else []
        return Example(row["id"], row["text"], codes.reshape(size).astype(np.int64), tuple(turns))

    @lru_cache(maxsize=8)  # noqa: B019  the data lives as long as the process
    def _codes(self, group):
        """Of a row group, pyarrow's list array."""
        import pyarrow.parquet as pq

        path, i = self.groups[group]
        column = _read_column(path, lambda columns: pq.ParquetFile(path).read_row_group(i, columns), "codes")
        return column.combine_chunks()

    def check_lengths(self, prompts, positions, add_eos):
        """How many tokens a row has at most. InputError where one takes more than so many positions."""
        longest = 0
        columns = (self.table[name].to_pylist() for name in ("id", "text", "response", "turns", "height", "width"))
        for i, (name, text, response, turns, height, width) in enumerate(zip(*columns, strict=True)):
            texts = [text, response or "", *(v for turn in turns or [] for v in turn.values())]
            picture = prompts.grammar.num_tokens(height, width)
            try:
                # no token is of less than a byte; templates and the picture's head take the rest
                tokens = sum(len(normalized(text).encode()) for text in texts) + picture + 64 * len(texts)
                if tokens > max(longest, positions):
                    tokens = len(make_row(prompts, self.example(i), add_eos=add_eos)[0])
            except InputError as error:  # a text that takes too long
                raise InputError(f"row {shown(name)}: {error}") from None
            longest = max(longest, tokens)
            if tokens > positions:
                raise InputError(
                    f"row {shown(name)} takes {tokens} tokens and the model has {positions} positions: prepare "
                    "it with a smaller --image_area, shorten the text, or give larger --max_position_embeddings"
                )
        return longest


def _read_column(path, read, name):
    """A column of a file, of the type that `emu3 prepare` gives it. read(columns=[name]) gives a table."""
    import pyarrow as pa

    try:
        column = read(columns=[name])[name].cast(schema().field(name).type)
        column.validate(full=True)  # that texts are UTF-8
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: cannot read its column {name} ({reason}): give what `emu3 prepare` wrote") from None
    return column


def _digest(table):
    """Of the light columns, the same in whatever files the rows are."""
    digest = 0
    for column in (table[name] for name in LIGHT):
        for chunk in column.chunks:  # few values at once
            digest = zlib.crc32("".join(f"{value!r}\n" for value in chunk.to_pylist()).encode(), digest)
    return digest


def make_row(prompts, example, loss_on="vision", add_eos=False, without_text=False):
    """The ids and labels of one example, two lists of one length; IGNORED where a label does not count.

    To draw, as the original has it: BOS text BOI "h*w" IMG rows EOF EOI. To understand: the chat template with the
    picture and the question, the answer, EOS; the labels are the answers and their EOS.

    Args:
        prompts: processors.prompts.Prompts.
        example: Example.
        loss_on: of a drawing: "vision" are its visual tokens, "text" its text, "all" is everything.
        add_eos: end a drawing with EOS, a label.
        without_text: leave the text of a drawing away.
    """
    grammar = prompts.grammar
    if example.conversation:
        turns = [
            turn for text, response in example.conversation for turn in (("user", [text]), ("assistant", [response]))
        ]
        turns[0] = "user", [example.codes, example.conversation[0][0]]
        pieces = [*prompts.conversation(turns[:-1]), ("assistant", prompts.answer(turns[-1][1][0]))]
        ids = [i for _, piece in pieces for i in piece]
        labels = [i if role == "assistant" else IGNORED for role, piece in pieces for i in piece]
        return ids, labels
    prompt = prompts.drawing_prompt("" if without_text else example.text)
    picture = grammar.encode(example.codes)
    visual = range(grammar.first_visual, grammar.first_visual + grammar.codebook_size)
    labels = {
        "vision": [IGNORED] * len(prompt) + [i if i in visual else IGNORED for i in picture],
        "text": prompt + [IGNORED] * len(picture),
        "all": prompt + picture,
    }[loss_on]
    end = [grammar.eos] if add_eos else []
    return prompt + picture + end, labels + end


class Rows:
    """The rows of prepared data that are trained, and those that are held out.

    Args:
        data: PreparedData.
        prompts: processors.prompts.Prompts.
        settings: Settings.
        positions: tokens of a row at most.

    Raises:
        InputError: a row of more tokens, or no row to train.
    """

    def __init__(self, data, prompts, settings, positions):
        self.data, self.prompts, self.settings = data, prompts, settings
        self.longest = data.check_lengths(prompts, positions, settings.add_eos)
        if settings.eval_rows >= len(data):
            raise InputError(f"eval_rows is {settings.eval_rows} of {len(data)} rows: leave some to train")
        shuffled = _random(settings.seed, HELD_OUT).permutation(len(data))
        self.held_out, self.trained = np.split(shuffled, [settings.eval_rows])

    def of_step(self, step, count, rank=0, ranks=1):
        """Of the `count` rows of a step those of process `rank` of so many, the shortest first. Each row comes once in
        an epoch, in an order of its own."""
        chosen = []
        for place in range(step * count, (step + 1) * count):
            epoch, place = divmod(place, len(self.trained))
            order = _order(self.settings.seed, epoch, len(self.trained))
            drop = 0 if self.settings.loss_on == "text" else self.settings.null_prompt_prob  # else without a label
            index = int(self.trained[order[place]])
            chosen.append((index, _random(self.settings.seed, PROMPTED, epoch, index).random() < drop))
        return self._share(chosen, rank, ranks)

    def of_evaluation(self, rank=0, ranks=1):
        """Of the rows that are held out those of a process, the shortest first."""
        return self._share([(index, False) for index in self.held_out.tolist()], rank, ranks)

    def _share(self, chosen, rank, ranks):
        """Each process makes its own rows only; all have about as many tokens."""
        chosen = sorted(chosen, key=lambda one: self.data.sizes[one[0]])[rank::ranks]
        return sorted((self._row(*one) for one in chosen), key=lambda row: len(row.ids))

    def _row(self, index, without_text):
        example, how = self.data.example(index), self.settings
        return Row(example.id, *make_row(self.prompts, example, how.loss_on, how.add_eos, without_text))


@lru_cache(maxsize=2)
def _order(seed, epoch, count):
    return _random(seed, SHUFFLED, epoch).permutation(count)


def _random(seed, purpose, *place):
    return np.random.default_rng([seed, purpose, *place])


def collate(rows, pad):
    """Rows -> ids, labels, int64 [rows, length], padded on the right."""
    ids, _ = pad_rows([row.ids for row in rows], pad, side="right")
    labels, _ = pad_rows([row.labels for row in rows], IGNORED, side="right")
    return ids, labels
