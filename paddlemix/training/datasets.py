# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prepared data as rows of ids and labels, in an order that a seed decides."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from paddlemix.utils import InputError, pad_rows, shown

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

    The texts are in memory; the codes are read when they are needed, a row group at a time.

    Args:
        paths: one or several; of a folder named twice each row comes twice in an epoch.
        codebook_size: codes are below it.

    Raises:
        InputError: files missing or damaged, columns missing, doubled ids, empty texts or answers, no row at all.
    """

    def __init__(self, paths, codebook_size):
        import pyarrow as pa

        self.codebook_size, self.groups, tables, self.failed = codebook_size, [], [], 0
        for path in dict.fromkeys(map(Path, paths)):
            if path.is_dir():
                files = sorted(path.glob("*.parquet"))
            else:
                files = [path] if path.exists() else []
            if not files:
                raise InputError(f"{path}: there is no Parquet file: give what `emu3 prepare` wrote")
            tables += [self._read_light(file) for file in files] * list(map(Path, paths)).count(path)
        table = pa.concat_tables(tables)
        well = table["error"].is_null()
        self.failed = len(table) - sum(well.to_pylist())
        self.table = table.filter(well)
        self._check()

    def __len__(self):
        return len(self.table)

    def _read_light(self, path):
        """The light columns of a file, and where the codes of each row are."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            file = pq.ParquetFile(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise InputError(f"{path} is not a Parquet file that can be read ({error})") from None
        if missing := [name for name in COLUMNS if name not in file.schema_arrow.names]:
            raise InputError(f"{path} has no column {', '.join(missing)}: give what `emu3 prepare` wrote")
        table = file.read([name for name in LIGHT if name in file.schema_arrow.names])
        for name in ("turns", "error"):
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        counts = [file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)]
        first = len(self.groups)
        self.groups += [(path, i) for i in range(len(counts))]
        group = np.repeat(np.arange(first, first + len(counts)), counts)
        place = np.concatenate([np.arange(count) for count in counts] or [np.zeros(0, np.int64)])
        return table.append_column("group", pa.array(group)).append_column("place", pa.array(place))

    def _check(self):
        import pyarrow.compute as pc

        if not len(self):
            raise InputError("the data has no row without an error: look at the column `error` of what was prepared")

        def refuse(where, fault):
            if found := self.table["id"].filter(where).to_pylist():
                more = f" and {len(found) - 1} more rows" if len(found) > 1 else ""
                raise InputError(f"row {shown(found[0])}{more} of the data {fault}: mend or remove them")

        table, empty = self.table, lambda column: pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(column)), 0)
        for name in ("id", "text", "height", "width"):
            if table[name].null_count:
                raise InputError(f"{table[name].null_count} rows of the data have no {name}: mend or remove them")
        refuse(empty(table["text"]), "has an empty text")
        refuse(pc.fill_null(empty(table["response"]), False), "has a picture and a question without an answer")
        places = table.select(["group", "place"]).to_pandas()
        ids = table["id"].to_pandas()[~places.duplicated().to_numpy()]
        if len(twice := ids[ids.duplicated()]):
            raise InputError(f"several rows of the data have the id {shown(twice.iloc[0])}: give each its own")

    def example(self, index):
        """The Example of a row. InputError: codes that cannot be."""
        row = {name: self.table[name][index].as_py() for name in self.table.column_names}
        codes = self._codes(row["group"])[row["place"]]
        codes, size = np.zeros(0) if codes is None else np.array(codes), (row["height"], row["width"])
        if codes.size != size[0] * size[1] or not codes.size:
            raise InputError(f"row {shown(row['id'])} has {codes.size} codes for a picture of {size[0]} x {size[1]}")
        if codes.dtype.kind not in "iu" or not 0 <= codes.min() <= codes.max() < self.codebook_size:
            raise InputError(
                f"row {shown(row['id'])} has codes from {codes.min()} to {codes.max()}, the model's are 0 to "
                f"{self.codebook_size - 1}: prepare the data with the vision tokenizer that belongs to it"
            )
        turns = [] if row["response"] is None else [(row["text"], row["response"])]
        turns += [(turn["text"], turn["response"]) for turn in row["turns"] or []] if turns else []
        return Example(row["id"], row["text"], codes.reshape(size).astype(np.int64), tuple(turns))

    @lru_cache(maxsize=8)  # noqa: B019  the data lives as long as the process
    def _codes(self, group):
        import pyarrow.parquet as pq

        path, i = self.groups[group]
        return pq.ParquetFile(path).read_row_group(i, ["codes"])["codes"].to_pylist()

    def check_lengths(self, prompts, positions):
        """How many tokens a row has at most. InputError where one takes more than so many positions."""
        longest = 0
        columns = (self.table[name].to_pylist() for name in ("text", "response", "turns", "height", "width"))
        for i, (text, response, turns, height, width) in enumerate(zip(*columns, strict=True)):
            texts = [text, response or "", *(v for turn in turns or [] for v in turn.values())]
            picture = prompts.grammar.num_tokens(height, width)
            # no token is of less than a byte; templates and the picture's head take the rest
            tokens = sum(len(text.encode()) for text in texts) + picture + 64 * len(texts)
            if tokens > max(longest, positions):
                example = self.example(i)
                tokens = len(make_row(prompts, example, add_eos=True)[0])
            longest = max(longest, tokens)
            if tokens > positions:
                raise InputError(
                    f"row {shown(example.id)} takes {tokens} tokens and the model has {positions} positions: prepare "
                    "it with a smaller --image_area, shorten the text, or give larger --max_position_embeddings"
                )
        return longest


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
        self.longest = data.check_lengths(prompts, positions)
        if settings.eval_rows >= len(data):
            raise InputError(f"eval_rows is {settings.eval_rows} of {len(data)} rows: leave some to train")
        shuffled = _random(settings.seed, HELD_OUT).permutation(len(data))
        self.held_out, self.trained = np.split(shuffled, [settings.eval_rows])

    def of_step(self, step, count):
        """The `count` rows of a step, the shortest first: each row once in an epoch, in an order of its own."""
        rows = []
        for place in range(step * count, (step + 1) * count):
            epoch, place = divmod(place, len(self.trained))
            order = _order(self.settings.seed, epoch, len(self.trained))
            drop = 0 if self.settings.loss_on == "text" else self.settings.null_prompt_prob  # else without a label
            index = int(self.trained[order[place]])
            rows.append(self._row(index, _random(self.settings.seed, PROMPTED, epoch, index).random() < drop))
        return sorted(rows, key=lambda row: len(row.ids))

    def of_evaluation(self):
        """The rows that are held out, the shortest first."""
        return sorted((self._row(int(index)) for index in self.held_out), key=lambda row: len(row.ids))

    def _row(self, index, without_text=False):
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
