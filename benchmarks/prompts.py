# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Prompts and decoding on a CPU beside llama.cpp, with the same weights.

A model of the released width with 4 layers and the whole head; random weights, written once as a checkpoint (5 GB) and
as GGUF files (9 GB). int8 is beside Q8_0, int4 beside Q4_0, bfloat16 beside F16. The two sides take turns, each time in
a process of its own, and the best of the rounds counts. Fails where the logits of the two are not of the same model.
"""

import re
import statistics
from pathlib import Path

import numpy as np
from machine import describe
from measure import LLAMA, ROOT, call, timed

HAS_LLAMA = True
CONFIG = {"model_type": "Emu3", "torch_dtype": "bfloat16", "num_hidden_layers": 4}  # all else as released
BESIDE = {"int8": "Q8_0", "int4": "Q4_0", "bfloat16": "F16"}
LEAST_CORRELATION = {"int8": 0.99, "int4": 0.9, "bfloat16": 0.99}  # two kinds of 4 bits differ by more
SHORT_PROMPT = 40  # tokens of each row before it is decoded
STEPS = 16
PLOT = ROOT / "docs/prompts.svg"

TITLE = "Prompts and decoding beside llama.cpp, the released width x 4 layers"
HEADS = ["", "weights", "ours, tokens/s", "llama.cpp, tokens/s", "ours / llama.cpp", "llama.cpp's best"]
PROMPT_ROW, ROWS_ROW = "a prompt of {:,} tokens", "decoding, rows: {}"
TEXT = f"""\
Hidden 4096, intermediate 14336, 32 heads, 8 key heads, the whole head of 184,622 tokens; the same random weights. A
prompt: all of its tokens and the logits after it; ours in the parts that the engine reads it in, llama.cpp's with
n_batch = n_ubatch = 512. Decoding: tokens of all rows together, each after {SHORT_PROMPT} tokens, with all logits; the
median of {STEPS} passes. Every matrix of a GGUF file is of the one type, the head too. llama.cpp is compiled for the
machine, and measured with its flash attention and without. Of both sides the fastest round counts. Equal: logits after
the shortest prompt and of the last pass of the most rows.

![Tokens a second of prompts](../docs/{PLOT.name})
"""


def add_arguments(parser):
    parser.add_argument("--dtypes", nargs="+", default=list(BESIDE), choices=list(BESIDE))
    parser.add_argument("--lengths", nargs="+", type=int, default=[512, 2048, 4200, 8200], help="tokens of prompts")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2, 4, 8], help="rows that are decoded together")
    parser.add_argument("--rounds", type=int, default=2, help="of each side")
    parser.add_argument("--plot", type=Path, default=PLOT, help="the prompts' part of the table as an SVG")


def run(args, page):
    directory = args.directory / "prompts"
    given = {"lengths": [20, 40], "rows": [1, 2]} if args.small else {"lengths": args.lengths, "rows": args.rows}
    sides = ["ours"] if args.no_llama else ["ours", LLAMA]
    call(args, "ours", "prompts.write", directory=directory, small=args.small)
    if not args.no_llama:
        call(args, LLAMA, "peer.llama.write", directory=directory)
    for dtype in args.dtypes:
        print(f"{dtype}:", flush=True)
        outputs = {side: args.directory / f"prompts-{side}.npy" for side in sides}
        rounds = {side: [] for side in sides}
        for _ in range(args.rounds):
            for side in sides:
                how = {"directory": directory, "dtype": dtype, "output": outputs[side], **given}
                rounds[side].append(call(args, side, "prompts.measure", **how))
        is_equal, note = True, "ours only"
        if not args.no_llama:
            is_equal, note = compare_logits(*(np.load(outputs[side]) for side in sides), LEAST_CORRELATION[dtype])
        page.put(TITLE, HEADS, lines(dtype, rounds), TEXT, {f"prompts {dtype}": note}, names=2)
        versions = {name: text for found in rounds.values() for name, text in found[0]["versions"].items()}
        page.put_machine([f"prompts {dtype}"], describe(versions))
        plot(page.cells(TITLE), args.directory / PLOT.name if args.small else args.plot)
        yield dtype, is_equal, rounds


def write(side, directory, small):
    from random_checkpoints import LANGUAGE_CONFIG, write_model

    write_model(directory, {**LANGUAGE_CONFIG, "torch_dtype": "bfloat16"} if small else CONFIG)


# --- in a process of its own -----------------------------------------------------------------------------


def measure(side, directory, dtype, lengths, rows, output):
    """{"modes": {mode of the side: {"prompts": {tokens: seconds}, "steps": {rows: seconds of a pass}}}}

    Into `output` go logits [1 + rows, vocab_size]: after the shortest prompt, and of the last pass of the most rows.
    A side's LanguageModel has `modes`; `reader(mode, length)`, a function that reads a prompt of up to `length` tokens
    and gives the logits after it; and `stepper(mode, prompt, length, rows)`, one that takes each row's next token after
    the prompt and gives logits [rows, vocab_size].
    """
    model = side.LanguageModel(Path(directory), dtype)
    result = {}
    for mode in model.modes:
        result[mode] = found = {"prompts": {}, "steps": {}}
        read = model.reader(mode, max(*lengths, SHORT_PROMPT))
        read(tokens(SHORT_PROMPT))  # which warms up
        for length in sorted(lengths, reverse=True):
            found["prompts"][length], after_prompt = timed(read, tokens(length))
        for count in sorted(rows):
            step = model.stepper(mode, tokens(SHORT_PROMPT), SHORT_PROMPT + 1 + STEPS, count)
            ids = tokens((1 + STEPS) * count)
            passes = [timed(step, ids[i : i + count]) for i in range(0, len(ids), count)]
            found["steps"][count] = statistics.median(seconds for seconds, _ in passes[1:])
    np.save(output, np.concatenate([after_prompt[None], passes[-1][1]]))
    return {"modes": result}


def tokens(count):
    return np.random.default_rng(0).integers(256, 100_000, count).tolist()


# --- what is compared ------------------------------------------------------------------------------------


def compare_logits(ours, theirs, least):
    """(whether they correlate in each row as two roundings of one model do, a line about it)"""
    lowest = min(np.corrcoef(a, b)[0, 1] for a, b in zip(ours, theirs, strict=True))
    same = int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    is_equal = bool(lowest >= least)
    verdict = "equal" if is_equal else "**NOT EQUAL**"
    return is_equal, f"{verdict}: logits correlate by {lowest:.4f} or more; {same} of {len(ours)} greedy tokens same"


def lines(dtype, rounds):
    """The rows of the table; what was not measured is a dash."""
    best = {side: best_of(found) for side, found in rounds.items()}
    out = []
    for (kind, count), (seconds, _) in best["ours"].items():
        name, amount = (PROMPT_ROW if kind == "prompts" else ROWS_ROW).format(int(count)), int(count)
        theirs, mode = best.get(LLAMA, {}).get((kind, count), (None, "-"))
        speeds = [f"{amount / s:.1f}" if s else "-" for s in (seconds, theirs)]
        ratio = f"**{theirs / seconds:.2f}**" if theirs else "-"
        out.append([name, f"{dtype}, {BESIDE[dtype]}", *speeds, ratio, mode])
    return out


def best_of(rounds):
    """{(kind, count): (fewest seconds, the mode that took them)} of the rounds and modes of one side"""
    best = {}
    for found in rounds:
        for mode, kinds in found["modes"].items():
            for kind, times in kinds.items():
                for count in sorted(times, key=int):
                    best[kind, count] = min(best.get((kind, count), (np.inf, "")), (times[count], mode))
    return best


def plot(cells, path):
    """Tokens a second over the length of a prompt, a panel for each type of weights. cells: of Page.cells."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = {}  # {weights: {length: {column: cell}}}
    for name, row in cells.items():
        if found := re.fullmatch(r"a prompt of ([\d,]+) tokens, (\w+, \w+)", name):
            panels.setdefault(found[2], {})[int(found[1].replace(",", ""))] = row
    size = (3.4 * len(panels), 3.4)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, (weights, rows) in zip(axes[0], panels.items(), strict=True):
        for column in HEADS[2:4]:
            points = [(length, float(row[column])) for length, row in sorted(rows.items()) if row[column] != "-"]
            axis.plot([x for x, _ in points], [y for _, y in points], "o-", label=column.partition(",")[0])
        axis.set(title=weights, xlabel="tokens of a prompt", ylim=(0, None))
    axes[0][0].set(ylabel="tokens a second")
    axes[0][0].legend()
    figure.savefig(path, metadata={"Date": None})
