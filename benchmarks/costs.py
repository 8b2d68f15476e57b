# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What a task costs: seconds and peak memory against the size of the picture, beside a model of both.

A language model of hidden 1024 x 8 layers over the real vocabulary and a vision tokenizer of the released size, random
weights. The bytes that a task reads, or its operations, are counted from the config. The model of its seconds has two
constants, a rate and what every call takes; they are those of the two smallest sizes, and the other sizes check them.
Memory is by the formulas that the commands themselves check with (models/emu3/needs.py). Each size of each task is a
process of its own.
"""

import re
from pathlib import Path

import numpy as np
from counts import FIRST_VISUAL, NEGATIVE_PROMPT, PROMPT, VISUAL_TOKENS, image_bytes, layer_weights, vision_operations
from machine import describe
from measure import ROOT, call, timed
from released import tokens, words

from paddlemix.machine import peak_host_memory, return_freed_memory
from paddlemix.models.emu3.needs import parameters, training_bytes, vision_bytes, weight_bytes

TASKS = {
    "encode": ["float32"], "decode": ["float32"], "generate": ["float32", "int8"], "question": ["float32", "int8"],
    "train": ["float32"],
}  # fmt: skip
SIZES, SMALL = [16, 32, 64, 90], [3, 4, 6]
SECONDS, MOST_CALLS = 8, 5  # a task is called again while it has taken less, and so often at most
PROMPTS = PROMPT, NEGATIVE_PROMPT
NO_LABEL = -100
PLOT = ROOT / "docs/costs.svg"

TITLE = "What a task costs, hidden 1024 x 8 layers over the real vocabulary"
HEADS = ["", "codes a side", "seconds", "the model", "off by", "peak, GB", "the formula", "it is off by"]
TEXT = f"""\
Encode, decode: the vision tokenizer of the released size. Generate: greedy, with guidance, sequential. Question: a
prompt of the picture and {PROMPT} words, up to the first word of the answer. Train: a step of AdamW on one picture with
its prompt, the layers recomputed. The best of up to {MOST_CALLS} calls within {SECONDS} s, after one with a small
picture. Fitted: the model's two constants are from this size. The formula is that of the commands and {{:.2f}} GB of
the program before anything is loaded.

![Seconds and memory against size](../docs/{PLOT.name})
"""
RELEASED = "What a task costs: the constants, and the released model (8.49 billion parameters) by arithmetic"
RELEASED_SIZES = 64, 90
RELEASED_HEADS = ["", "every call", "rate", *(f"{x}{n} codes a side" for n in RELEASED_SIZES for x in ("", "memory, "))]
RELEASED_TEXT = """\
The constants are measured. **What follows is arithmetic, not measurement**: the same rates with the released config, on
this machine if it had the memory. What every step of training takes is AdamW, and grows with the parameters. The vision
tokenizer that was measured is the released one.
"""


def add_arguments(parser):
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="codes a side, two or more")
    parser.add_argument("--plot", type=Path, default=PLOT, help="the table as an SVG")


def run(args, page):
    import paddle

    directory, sizes = args.directory / "checkpoints", SMALL if args.small else sorted(args.sizes)
    call(args, "ours", "compare.write_checkpoints", directory=directory, small=args.small)
    paddle.set_device("cpu")  # whose formulas are asked for
    for task in args.tasks:
        for dtype in TASKS[task]:
            print(f"{task}, {dtype}:", flush=True)
            given = {"directory": directory, "task": task, "dtype": dtype}
            found = {size: call(args, "ours", "costs.measure", **given, size=size) for size in sizes}
            put(page, task, dtype, found, configs(directory))
            page.put_machine([f"costs {task} {dtype}"], describe(found[sizes[0]]["versions"]))
            plot(page.cells(TITLE), args.directory / PLOT.name if args.small else args.plot)
            yield f"{task} {dtype}", True, found


def configs(directory=None):
    """Those of the language model and the vision tokenizer; without a directory the released ones."""
    from paddlemix.models.emu3 import Emu3Config, Emu3VisionVQConfig

    if directory is None:
        return Emu3Config(), Emu3VisionVQConfig()
    return Emu3Config.from_pretrained(directory / "language"), Emu3VisionVQConfig.from_pretrained(directory / "vision")


# --- in a process of its own -----------------------------------------------------------------------------


def measure(side, directory, task, dtype, size):
    """{"program_bytes", "seconds": of each call, "peak_bytes"} of a task with a picture of size x size codes."""
    program, directory = peak_host_memory(), Path(directory)
    do = globals()[task](side, directory / ("vision" if task in ("encode", "decode") else "language"), dtype)
    do(2)
    seconds = []
    while sum(seconds) < SECONDS and len(seconds) < MOST_CALLS:
        seconds.append(timed(do, size)[0])
    return {"program_bytes": program, "seconds": seconds, "peak_bytes": peak_host_memory()}


def encode(side, checkpoint, dtype):
    call_encode, _ = side.load_vision(checkpoint)
    rng = np.random.default_rng(0)
    return lambda size: call_encode(rng.uniform(-1, 1, [1, 3, 8 * size, 8 * size]).astype(np.float32))


def decode(side, checkpoint, dtype):
    _, call_decode = side.load_vision(checkpoint)
    rng = np.random.default_rng(0)
    return lambda size: call_decode(rng.integers(0, VISUAL_TOKENS, [1, size, size]))


def generate(side, checkpoint, dtype):
    config, _ = configs(checkpoint.parent)
    positive, negative = ([*words(config, n), config.boi_token_id, config.img_token_id] for n in PROMPTS)
    given = {"positive": positive, "negative": negative, "guidance_scale": 3.0}

    def draw(size):
        given["size"] = size, size  # of the same dict
        return call_generate()

    call_generate = side.load_generation(checkpoint, given, dtype, "step")
    return draw


def question(side, checkpoint, dtype):
    from paddlemix.models.emu3 import Emu3ForCausalLM, generate_text

    model = Emu3ForCausalLM.from_pretrained(checkpoint, dtype=dtype, progress=False)
    return lambda size: next(generate_text(model, [words(model.config, PROMPT + tokens(size, size))], 1))


def train(side, checkpoint, dtype):
    return_freed_memory()  # as the command does
    step, rng = side.load_training(checkpoint, True, 0.0), np.random.default_rng(0)

    def do(size):
        ids = rng.integers(FIRST_VISUAL, FIRST_VISUAL + VISUAL_TOKENS, [1, PROMPT + tokens(size, size)])
        labels = ids.copy()
        labels[:, :PROMPT] = NO_LABEL
        return step(ids, labels)

    return do


# --- the model -------------------------------------------------------------------------------------------


def work(task, dtype, size, language, vision):
    """What a task does with a picture of size x size codes: bytes that `generate` reads, else operations."""
    c, drawn = language, tokens(size, size)
    length = PROMPT + drawn
    if task in ("encode", "decode"):
        return vision_operations(vision, 8 * size)[task]
    if task == "generate":
        return image_bytes(c, size, size, dtype)
    attention = 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * length**2  # half of two products
    layers, head = 2 * layer_weights(c) * length + attention, 2 * c.vocab_size * c.hidden_size  # of a token
    if task == "question":
        return layers + head
    return 4 * layers + 3 * head * drawn  # forward, recomputed, and two products of each in the backward pass


def memory(task, dtype, size, language, vision):
    """Bytes beside the program, as the commands expect them before they begin."""
    from paddlemix.models.emu3.cache import cache_bytes

    if task in ("encode", "decode"):
        return sum(vision_bytes(vision, (8 * size) ** 2))
    length = PROMPT + tokens(size, size)
    if task == "train":
        return sum(training_bytes(language, dtype, length, recompute=True).values())
    cached = sum(PROMPTS) + 2 * tokens(size, size) if task == "generate" else length
    return weight_bytes(language, dtype) + cache_bytes(language, cached, dtype)


def fit(amounts, seconds):
    """(seconds of every call, amount a second) from two sizes"""
    rate = (amounts[1] - amounts[0]) / (seconds[1] - seconds[0])
    fixed = seconds[0] - amounts[0] / rate
    return (fixed, rate) if fixed > 0 else (0.0, sum(amounts) / sum(seconds))


# --- the tables ------------------------------------------------------------------------------------------


def put(page, task, dtype, found, given):
    """A task's rows; and its constants, with what the released model would take. given: configs()."""
    name, sizes = f"{task}, {dtype}", sorted(found)
    best = {size: min(found[size]["seconds"]) for size in sizes}
    fixed, rate = fit([work(task, dtype, size, *given) for size in sizes[:2]], [best[size] for size in sizes[:2]])
    program = found[sizes[0]]["program_bytes"]
    rows = []
    for size in sizes:
        seconds, peak = fixed + work(task, dtype, size, *given) / rate, found[size]["peak_bytes"]
        formula = program + memory(task, dtype, size, *given)
        off = "fitted" if size in sizes[:2] else f"{seconds / best[size] - 1:+.0%}"
        rows.append([
            name, f"{size}", f"{best[size]:.2f}", f"{seconds:.2f}", off,
            f"{peak / 1e9:.2f}", f"{formula / 1e9:.2f}", f"{formula / peak - 1:+.0%}",
        ])  # fmt: skip
    page.put(TITLE, HEADS, rows, TEXT.format(program / 1e9), names=2)
    released = configs()
    row = [name, in_words(fixed), f"{rate / 1e9:.1f} {'GB/s' if task == 'generate' else 'GFLOP/s'}"]
    every = fixed * parameters(released[0]) / parameters(given[0]) if task == "train" else fixed
    for size in RELEASED_SIZES:
        seconds = every + work(task, dtype, size, *released) / rate
        needed = (program + memory(task, dtype, size, *released)) / 1e9
        row += ["measured"] * 2 if task in ("encode", "decode") else [in_words(seconds), f"{needed:.1f} GB"]
    page.put(RELEASED, RELEASED_HEADS, [row], RELEASED_TEXT)


def in_words(seconds):
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 300 else f"{seconds / 60:.0f} min"


def plot(cells, path):
    """Measured points on the lines of the model, seconds and memory, a colour for each task. cells: of Page.cells."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    tasks = {}  # {name: {size: {column: number}}}
    for name, row in cells.items():
        if found := re.fullmatch(r"(\w+, \w+), (\d+)", name):
            tasks.setdefault(found[1], {})[int(found[2])] = row
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    columns = HEADS[2:4], HEADS[5:7]
    for axis, (measured, model), unit in zip(axes, columns, ("seconds", "GB"), strict=True):
        for number, (name, rows) in enumerate(tasks.items()):
            sizes = sorted(rows)
            points, line = ([float(rows[size][column]) for size in sizes] for column in (measured, model))
            axis.plot(sizes, points, "o", color=f"C{number}", label=name)
            axis.plot(sizes, line, color=f"C{number}")
        axis.set(xscale="log", xlabel="codes a side", ylabel=unit)
        axis.set_xticks(sizes, map(str, sizes))
        axis.minorticks_off()
    axes[0].set(yscale="log", title="time: points measured, lines by the model")
    axes[1].set(ylim=(0, None), title="memory: lines by the formula")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
