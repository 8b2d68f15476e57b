# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The released language model's size on this machine: random weights of its exact layout, loaded and run.

Writes a checkpoint of 17 GB, bfloat16 in shards, once. For each dtype a process loads it, generates one image with
guidance, gives an answer of as many tokens, reads a question about a large image up to the first word of its answer and
saves the quantized model, and another one loads that. Reported are
seconds of loading, peak memory by the operating system's count, and forward passes a second as a share of the limit:
the bytes that a pass must read, at the rate at which this machine reads memory between the passes. transformers runs
passes on the same files in bfloat16.
"""

import math
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from counts import NEGATIVE_PROMPT, PROMPT
from machine import describe
from measure import PEER, call, threads, timed
from ours import read_rate

from paddlemix.machine import peak_host_memory

HAS_PEER = True
CONFIG = {"model_type": "Emu3", "torch_dtype": "bfloat16"}
DISK_BYTES = 2 << 30  # read to measure the disk
PASSES = 16  # from one measurement of reading to the next


def add_arguments(parser):
    parser.add_argument("--dtypes", nargs="+", default=["int8", "int4"], choices=["int8", "int4", "bfloat16"])
    parser.add_argument("--size", nargs=2, type=int, default=[16, 31], help="rows and columns of codes (512 tokens)")
    parser.add_argument("--picture", nargs=2, type=int, default=[90, 90], help="codes of the image that is asked about")


def run(args, page):
    directory = args.directory / "released"
    size, picture = ([2, 3], [9, 9]) if args.small else (args.size, args.picture)
    call(args, "ours", "released.write", directory=directory, small=args.small)
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.directory) as saved:
            given = {"directory": directory, "dtype": dtype, "size": size, "picture": picture, "saved": saved}
            r = call(args, "ours", "released.measure", **given)
            again = call(args, "ours", "released.measure_loading", directory=saved)
        put(page, dtype, size, picture, r, again)
        page.put_machine([f"released {dtype}"], describe(r["versions"]))
        yield dtype, True, {**r, "again": again}
    if not args.no_peer:
        peer = call(args, PEER, "peer.theirs.steps", directory=directory)
        row = ["bfloat16, transformers", "", f"{peer['pass_s']:.3f} s", f"{1 / peer['pass_s']:.2f}", *[""] * 4]
        page.put(PASSES_TITLE, PASSES_HEADS, [[*row, f"{peer['peak_bytes'] / 1e9:.2f} GB"]], passes_text(size))
        page.put_machine(["released transformers"], describe(peer["versions"]))
        yield "transformers", True, peer


def write(side, directory, small):
    from random_checkpoints import LANGUAGE_CONFIG, write_model

    write_model(directory, {**LANGUAGE_CONFIG, "torch_dtype": "bfloat16"} if small else CONFIG)


# --- in a process of its own -----------------------------------------------------------------------------


def measure(side, directory, dtype, size, picture, saved):
    model, result = load(directory, dtype=dtype)
    result["runs"] = {"text-to-image": generate(model, *size), "an answer": answer(model, *size)}
    result["question"] = question(model, *picture)
    result["peak_bytes"] = peak_host_memory()
    result["save_s"], _ = timed(model.save_pretrained, saved)
    return result


def measure_loading(side, directory):
    return load(directory)[1]


def load(directory, **options):
    from paddlemix.models.emu3 import Emu3ForCausalLM

    disk = disk_rate(directory)
    load_s, model = timed(lambda: Emu3ForCausalLM.from_pretrained(directory, progress=False, **options))
    return model, {"load_s": load_s, "load_peak_bytes": peak_host_memory(), **disk}


def disk_rate(directory):
    """Bytes of the shards, and how many a second come from the disk; afterwards none is in the system's cache."""
    files = sorted(Path(directory).glob("*.safetensors"))
    evict(files)
    left, start = DISK_BYTES, time.perf_counter()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while left > 0 and (piece := file.read(min(left, 1 << 24))):
                left -= len(piece)
    rate = (DISK_BYTES - left) / (time.perf_counter() - start)
    evict(files)
    return {"file_bytes": sum(path.stat().st_size for path in files), "disk_bytes_per_s": rate}


def evict(files):
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # what is not written yet cannot go
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tokens(height, width):
    return height * (width + 1) + 3  # after each row an end of line; the ends of frame, image and sequence


def generate(model, height, width):
    """Greedy, with guidance, sequential: two rows of a batch, and only the visual rows of the head."""
    from paddlemix.models.emu3 import Batch, Drawing, ImageGrammar, Sampling

    c, clock, grammar = model.config, Clock(model), ImageGrammar.from_config(model.config)
    positive, negative = ([*words(c, n), c.boi_token_id, c.img_token_id] for n in (PROMPT, NEGATIVE_PROMPT))
    image = Drawing(positive, (height, width), grammar, negative, sampling=Sampling(top_k=1))
    batch = Batch(model, "step")
    batch.join(image)
    while batch:
        clock(batch.step())
    cached = len(negative) + height * (width + 1) / 2
    return {
        "distinct": len(np.unique(image.codes())),
        "pass_bytes": pass_bytes(model, 2, cached, grammar.codebook_size),
        **clock.result(batch.forward_passes),
    }


def answer(model, height, width):
    """Text of as many tokens as the image: one row, and the whole head."""
    from paddlemix.models.emu3 import generate_text

    c, count, clock = model.config, tokens(height, width), Clock(model)
    for ids in generate_text(model, [words(c, PROMPT)], count):
        clock(ids)
    return {"pass_bytes": pass_bytes(model, 1, PROMPT + count / 2, c.vocab_size), **clock.result(len(clock.times) - 1)}


def question(model, height, width):
    """Seconds from a prompt of an image and as many words as PROMPT to the first word of the answer."""
    from paddlemix.models.emu3 import generate_text

    prompt = words(model.config, PROMPT + tokens(height, width))
    first_word_s, _ = timed(next, generate_text(model, [prompt], 1))
    return {"tokens": len(prompt), "first_word_s": first_word_s}


def words(config, count):
    return [config.bos_token_id, *np.random.default_rng(0).integers(256, 100_000, count).tolist()]


class Clock:
    """When passes end, and between some of them the rate of reading the embedding, which is in memory anyway: what a
    shared machine can read differs from minute to minute. The time that this takes is left out."""

    def __init__(self, model):
        embedding = np.from_dlpack(model.model.embed_tokens.weight.detach().view("int32"))
        self.parts = np.array_split(embedding.reshape(-1), threads())
        self.left_out, self.rates, self.times = 0.0, [], [time.perf_counter()]

    def __call__(self, _):
        self.times.append(time.perf_counter() - self.left_out)
        if len(self.times) % PASSES == 2:  # first after the prompts
            read_s, rate = timed(read_rate, self.parts, np.bitwise_or.reduce, 2)
            self.left_out += read_s
            self.rates.append(rate)

    def result(self, passes):
        """Seconds of the first pass, which reads the prompts, and of a later one."""
        times = self.times[: passes + 1]
        pass_s = (times[-1] - times[1]) / (passes - 1)
        return {"prompt_s": times[1] - times[0], "pass_s": pass_s, "read_bytes_per_s": statistics.median(self.rates)}


def pass_bytes(model, rows, cached, head_rows):
    """Bytes that a pass must read: the layers, rows of the head, keys and values of the cached tokens."""
    state = {name: t.element_size() * math.prod(t.shape) for name, t in model.state_dict().items()}
    layers = sum(size for name, size in state.items() if name.startswith("model.layers."))
    head = sum(size for name, size in state.items() if name.startswith("lm_head."))
    c, itemsize = model.config, 4 if model.weight_dtype == "float32" else 2  # of the cache
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize
    return int(layers + head * head_rows / c.vocab_size + rows * cached * kv)


# --- the tables ------------------------------------------------------------------------------------------

LOADING_TITLE = "The released language model's size (8.49 billion parameters): loading"
LOADING_HEADS = ["", "loaded from bfloat16", "reading alone", "loaded from its own files", "reading them alone",
                 "peak, loading", "peak, running"]  # fmt: skip
LOADING_TEXT = """\
Random weights of the released layout. Loading is from the disk, none of the files in the system's cache; reading alone
is what the files would take at the rate measured just before. The peaks are the process's, by the operating system's
count.
"""
PASSES_TITLE = "The released language model's size: forward passes"
PASSES_HEADS = ["", "the prompts", "a pass", "passes/s", "a pass reads", "at", "the limit", "reached", "peak"]


def passes_text(size):
    return f"""\
Text-to-image: {size[0]} x {size[1]} codes ({tokens(*size)} tokens) with guidance, two rows of a batch, sequential; a
pass generates a code, with the visual rows of the head. An answer: as many tokens, one row, all of the head. At: the
rate of reading 1.5 GB of memory between the passes, the median of every {PASSES}th; a shared machine reads more in one
minute than in another. transformers reads the same files; its passes are of two rows with all of the head, and its peak
includes the mapped files.
"""


QUESTION_TITLE = "The released language model's size: the first word of an answer about an image"
QUESTION_HEADS = ["", "the prompt", "to the first word", "tokens/s"]


def question_text(picture):
    return f"""\
A prompt of an image of {picture[0]} x {picture[1]} codes ({8 * picture[0]} x {8 * picture[1]} pixels) and {PROMPT}
words. The vision tokenizer's part is not in it; the command encodes the image while it reads the model.
"""


def put(page, dtype, size, picture, r, again):
    loads = [f"{n:.0f} s" for x in (r, again) for n in (x["load_s"], x["file_bytes"] / x["disk_bytes_per_s"])]
    peaks = [f"{r[name] / 1e9:.2f} GB" for name in ("load_peak_bytes", "peak_bytes")]
    page.put(LOADING_TITLE, LOADING_HEADS, [[dtype, *loads, *peaks]], LOADING_TEXT)
    rows = []
    for name, run in r["runs"].items():
        rate = run["read_bytes_per_s"]
        limit = run["pass_bytes"] / rate
        rows.append([
            f"{dtype}, {name}", f"{run['prompt_s']:.1f} s", f"{run['pass_s']:.3f} s", f"{1 / run['pass_s']:.2f}",
            f"{run['pass_bytes'] / 1e9:.2f} GB", f"{rate / 1e9:.1f} GB/s", f"{limit:.3f} s",
            f"{limit / run['pass_s']:.0%}", f"{r['peak_bytes'] / 1e9:.2f} GB",
        ])  # fmt: skip
    page.put(PASSES_TITLE, PASSES_HEADS, rows, passes_text(size))
    asked = r["question"]
    speed = asked["tokens"] / asked["first_word_s"]
    row = [dtype, f"{asked['tokens']:,} tokens", f"{asked['first_word_s']:.0f} s", f"{speed:.0f}"]
    page.put(QUESTION_TITLE, QUESTION_HEADS, [row], question_text(picture))
