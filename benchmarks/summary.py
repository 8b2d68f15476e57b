# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The opening of RESULTS.md: ten rows, taken from the tables that follow it."""

import re

import compare
import loading
import operators
import quality
from page import table

UNITS = {"s": 1, "ms": 1e-3, "GB": 1e9, "%": 1}
LINEAR, ATTENTION, OTHERS = map(operators.title, ("linear", "attention", "others"))
IMAGE = "16 x 16 tokens, {}, warm"
# the row's name and part; where ours stands: section, row, column; beside it: the same, or only the column; its name
ROWS = (
    ("encode and decode an image of 512 x 512, float32", "vision-512",
     (compare.VISION, "512 x 512 pixels, encode + decode, warm", "ours"), "transformers", "transformers"),
    ("its peak memory", "vision-512",
     (compare.VISION, "512 x 512 pixels, encode + decode, warm", "ours, peak"), "transformers, peak", "transformers"),
    ("text-to-image with guidance, 256 tokens, float32", "generate-16",
     (compare.GENERATION, IMAGE.format("float32"), "ours"), "transformers", "transformers"),
    ("its peak memory", "generate-16",
     (compare.GENERATION, IMAGE.format("float32"), "ours, peak"), "transformers, peak", "transformers"),
    *((f"text-to-image with guidance, 256 tokens, {dtype}", f"generate-16-{dtype}",
       (compare.GENERATION, IMAGE.format(dtype), "ours"),
       (compare.GENERATION, IMAGE.format("float32"), "ours"), "ours, float32") for dtype in ("int8", "int4")),
    ("linear layer of 4096 x 14336, 2 rows, float32", "few rows",
     (LINEAR, "gate_proj [14336, 4096], float32, 2", "ours"), "PyTorch", "PyTorch"),
    ("attention of one new token to 4,096 cached, float32", "attention over the cache",
     (ATTENTION, "float32, 4096, 1", "ours"), "Paddle", "Paddle"),
    ("2.03 billion parameters loaded as float16: peak memory", "loading float16",
     (loading.TITLE, "float16", "peak"), "the model", "the weights"),
    ("right answers of Emu3-Mini, int8", "quality",
     (quality.TITLE, "int8", "answers"), (quality.TITLE, "float32", "answers"), "ours, float32"),
)  # fmt: skip

HEAD = """# Results of `make bench`

Written by `benchmarks/bench.py`; `benchmarks/bench.py --help` explains how to run it. CPU only.

"""
TEXT = """
Each row compares like with like: the same work and the same number type, but for the rows that compare our own number
types. The ratio is the other's number divided by ours: above 1, ours is faster or smaller. transformers has the same
random weights, cores and threads; in float32 its results were checked to be equal. Every measurement is a process of
its own.
The rows are taken from the tables below; [Machines](#machines) has the commit and the whole of each machine.
"""


def opening(page):
    rows = []
    for name, part, (title, row, column), other, whose in ROWS:
        title_, row_, column_ = other if isinstance(other, tuple) else (title, row, other)
        ours, theirs = page.cells(title).get(row, {}).get(column), page.cells(title_).get(row_, {}).get(column_)
        if ours and theirs and "-" not in (ours, theirs):
            ratio = page.cells(title)[row].get(f"{column_} / ours")  # the tables' are of numbers not yet rounded
            ratio = ratio or ("" if ours.endswith("%") else f"**{number(theirs) / number(ours):.2f}**")
            rows.append([name, ours, theirs, whose, ratio, measured(page.machine(part))])
    return f"{HEAD}{table([['', 'ours', 'beside it', 'whose', 'ratio', 'measured'], *rows])}{TEXT}"


def measured(machine):
    """The date and the processor of a line under Machines."""
    date = re.search(r"\d{4}-\d\d-\d\d", machine)
    processor = re.search(r"; (.*?, \d+ cores)", machine)
    return f"{date[0] if date else 'date not recorded'}, {processor[1] if processor else 'machine not recorded'}"


def number(text):
    value, unit = text.split()
    return float(value) * UNITS[unit]
