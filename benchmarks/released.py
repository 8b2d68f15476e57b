# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The released language model's size on this machine: random weights of its exact layout, loaded and drawing.

    python benchmarks/released.py                          # int8 and int4
    python benchmarks/released.py --dtypes int8 --size 4 15

Writes a checkpoint of 17 GB, bfloat16 in shards, once. For each dtype a process loads it, draws one picture with
guidance, gives an answer of as many tokens and saves the quantized model, and another one loads that. Told are seconds
of loading, peak memory by the operating system's count, and passes a second as a share of the limit: the bytes that a
pass must read, at the rate at which this machine reads memory between the passes. The tables go into
benchmarks/RESULTS.md, with --peer_python beside transformers.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

from measure import best_rate, timed
from report import NEGATIVE_PROMPT, PROMPT, put_section

TITLE = "The released language model's size (8.49 billion parameters), quantized"
SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 2 << 30  # left free on the disk
PART = 1 << 22  # random numbers made at a time
DISK_BYTES = 2 << 30  # read to measure the disk
PASSES = 16  # from one measurement of reading to the next


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["int8", "int4"], choices=["int8", "int4", "bfloat16"])
    parser.add_argument("--size", nargs=2, type=int, default=[16, 31], help="rows and columns of codes (512 tokens)")
    parser.add_argument("--directory", type=Path, default=HERE / "run/released", help="of the checkpoint, kept")
    parser.add_argument("--report", type=Path, default=HERE / "RESULTS.md")
    parser.add_argument("--peer_python", type=Path, help="has transformers: its steps on the same files are timed, too")
    parser.add_argument("--work", choices=["run", "load"], help=argparse.SUPPRESS)
    parser.add_argument("--saved", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        return print(json.dumps(measure(args)))
    write(args.directory)
    rows = []
    for dtype in args.dtypes:
        with tempfile.TemporaryDirectory(dir=args.directory.parent) as saved:
            first, again = (start(args, dtype, work, saved) for work in ("run", "load"))
        rows.append({"dtype": dtype, **first, "again": again})
        print(json.dumps(rows[-1]), flush=True)
    peer = None
    if args.peer_python:
        command = [
            args.peer_python.absolute(),
            HERE / "peer/steps.py",
            args.directory,
            str(len(os.sched_getaffinity(0))),
        ]
        peer = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        )
        print(json.dumps(peer), flush=True)
    put_section(args.report, TITLE, section(args.size, rows, peer))
    print(f"wrote {args.report}")


def start(args, dtype, work, saved):
    command = [sys.executable, "-W", "ignore", __file__, f"--work={work}", f"--dtypes={dtype}", f"--saved={saved}"]
    command += [f"--directory={args.directory}", "--size", *map(str, args.size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --- the checkpoint --------------------------------------------------------------------------------------


def write(directory):
    """The released layout with random weights, scaled so that signals keep their size."""
    import paddle

    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM
    from paddlemix.models.emu3.safetensors_file import write_safetensors

    if (directory / "config.json").exists():  # comes last: with it all is there
        return
    with paddle.LazyGuard():
        shapes = {name: list(t.shape) for name, t in Emu3ForCausalLM(Emu3Config()).state_dict().items()}
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    directory.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(directory).free, sum(sizes.values())
    if free < needed + SPARE_BYTES:
        raise SystemExit(f"{directory} needs {needed / 1e9:.1f} GB and 2 GB to spare, {free / 1e9:.1f} GB are free")
    shards, size = [{}], 0
    for name, shape in shapes.items():
        if size + sizes[name] > SHARD_BYTES:
            shards, size = [*shards, {}], 0
        shards[-1][name] = ("bfloat16", shape)
        size += sizes[name]
    rng, weight_map = np.random.default_rng(0), {}
    pool = rng.standard_normal(4 * PART, dtype=np.float32)
    for i, layout in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(directory / file, layout, lambda name: random_tensor(rng, pool, name, shapes[name]))
        weight_map.update(dict.fromkeys(layout, file))
    index = {"metadata": {"total_size": needed}, "weight_map": weight_map}  # transformers wants the first, too
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    Emu3Config(torch_dtype="bfloat16").save_pretrained(directory)


def random_tensor(rng, pool, name, shape):
    """bfloat16: pieces of a pool of normal numbers, each from a place and of a width of its own, for speed."""
    import ml_dtypes

    if len(shape) == 1:  # a norm
        return np.ones(shape, ml_dtypes.bfloat16)
    out = np.empty(math.prod(shape), ml_dtypes.bfloat16)
    width = 1 if "embed_tokens" in name else 1 / math.sqrt(shape[1])
    for start in range(0, out.size, PART):
        count, place = min(PART, out.size - start), rng.integers(len(pool) - PART)
        out[start : start + count] = pool[place : place + count] * np.float32(width * rng.uniform(0.8, 1.2))
    return out


# --- in a process of its own -----------------------------------------------------------------------------


def measure(args):
    threads = len(os.sched_getaffinity(0))
    import paddle

    from paddlemix.machine import peak_host_memory
    from paddlemix.models.emu3 import Emu3ForCausalLM

    paddle.base.core.set_num_threads(threads)
    disk = disk_rate(args.saved if args.work == "load" else args.directory)
    if args.work == "load":
        load_s, _ = timed(lambda: Emu3ForCausalLM.from_pretrained(args.saved, progress=False))
        return {"load_s": load_s, "load_peak_bytes": peak_host_memory(), **disk}
    load_s, model = timed(lambda: Emu3ForCausalLM.from_pretrained(args.directory, dtype=args.dtypes[0], progress=False))
    result = {"load_s": load_s, "load_peak_bytes": peak_host_memory(), **disk}
    result["runs"] = {"a picture": draw(model, *args.size), "an answer": answer(model, *args.size)}
    result["peak_bytes"] = peak_host_memory()
    result["save_s"], _ = timed(model.save_pretrained, args.saved)
    return result


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
    return height * (width + 1) + 3  # after each row an end of line; the ends of frame, picture and sequence


def draw(model, height, width):
    """Greedy, with guidance, step by step: two rows of a batch, and only the visual rows of the head."""
    from paddlemix.models.emu3 import ImageGrammar, generate_images
    from paddlemix.models.emu3.generation_emu3 import Sampling

    c, clock = model.config, Clock(model)
    grammar = ImageGrammar(
        img=c.img_token_id, boi=c.boi_token_id, eoi=c.eoi_token_id, eol=c.eol_token_id, eof=c.eof_token_id,
        eos=c.eos_token_id, pad=c.pad_token_id, first_visual=151854, codebook_size=32768,
    )  # fmt: skip
    prompts = [[*words(c, n), c.boi_token_id, c.img_token_id] for n in (PROMPT, NEGATIVE_PROMPT)]
    pictures = generate_images(
        model, prompts[:1], [(height, width)], grammar, prompts[1:], sampling=Sampling(top_k=1), decoding="step",
        on_tokens=clock,
    )  # fmt: skip
    cached = len(prompts[1]) + height * (width + 1) / 2
    return {
        "distinct": len(np.unique(pictures.codes[0])),
        "pass_bytes": pass_bytes(model, 2, cached, grammar.codebook_size),
        **clock.result(pictures.forward_passes),
    }


def answer(model, height, width):
    """Text of as many tokens as the picture: one row, and the whole head."""
    from paddlemix.models.emu3.generation_emu3 import generate_text

    c, count, clock = model.config, tokens(height, width), Clock(model)
    for ids in generate_text(model, [words(c, PROMPT)], count):
        clock(ids)
    return {"pass_bytes": pass_bytes(model, 1, PROMPT + count / 2, c.vocab_size), **clock.result(len(clock.times) - 1)}


def words(config, count):
    return [config.bos_token_id, *np.random.default_rng(0).integers(256, 100_000, count).tolist()]


class Clock:
    """When passes end, and between some of them the rate of reading the embedding, which is in memory anyway: what a
    shared machine can read differs from minute to minute. The time that this takes is left out."""

    def __init__(self, model):
        threads = len(os.sched_getaffinity(0))
        embedding = np.from_dlpack(model.model.embed_tokens.weight.detach().view("int32"))
        self.parts, self.pool = np.array_split(embedding.reshape(-1), threads), ThreadPoolExecutor(threads)
        self.left_out, self.rates, self.times = 0.0, [], [time.perf_counter()]

    def __call__(self, _):
        self.times.append(time.perf_counter() - self.left_out)
        if len(self.times) % PASSES == 2:  # first after the prompts
            read_s, rate = timed(best_rate, sum(part.nbytes for part in self.parts), self.read, 2)
            self.left_out += read_s
            self.rates.append(rate)

    def read(self):
        list(self.pool.map(np.bitwise_or.reduce, self.parts))

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
    c, itemsize = model.config, model.make_cache(1, 1).keys[0].element_size()
    kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * itemsize
    return int(layers + head * head_rows / c.vocab_size + rows * cached * kv)


def loading(r):
    return f"{r['load_s']:.0f} s ({r['file_bytes'] / r['disk_bytes_per_s']:.0f} s)"


def section(size, rows, peer=None):
    text = "| | loaded from bfloat16 | from its own files | peak, loading | peak, running |\n" + "|---" * 5 + "|\n"
    for r in rows:
        peaks = (f"{r[name] / 1e9:.2f} GB" for name in ("load_peak_bytes", "peak_bytes"))
        text += f"| {' | '.join([r['dtype'], loading(r), loading(r['again']), *peaks])} |\n"
    text += "\n| | the prompts | a pass | passes/s | a pass reads | at | the limit | reached |\n" + "|---" * 8 + "|\n"
    for r in rows:
        for name, run in r["runs"].items():
            rate = run["read_bytes_per_s"]
            limit = run["pass_bytes"] / rate
            cells = [
                f"{r['dtype']}, {name}", f"{run['prompt_s']:.1f} s", f"{run['pass_s']:.3f} s",
                f"{1 / run['pass_s']:.2f}", f"{run['pass_bytes'] / 1e9:.2f} GB", f"{rate / 1e9:.1f} GB/s",
                f"{limit:.3f} s", f"{limit / run['pass_s']:.0%}",
            ]  # fmt: skip
            text += f"| {' | '.join(cells)} |\n"
    text += f"""
`benchmarks/released.py`: random weights of the released layout. A picture: {size[0]} x {size[1]} codes
({tokens(*size)} tokens) with guidance, two rows of a batch, step by step; a pass draws a code, of the visual rows of
the head. An answer: as many tokens, one row, all of the head. At: the rate of reading 1.5 GB of memory between the
passes, the median of every {PASSES}th; a shared machine reads more in one minute than in another. The peaks are the
process's, by the operating system's count. Loading is from the disk, none of the files in the system's cache; in
brackets what reading them alone would take at the rate measured just before.
"""
    if peer:
        versions = " with ".join(f"{name} {version}" for name, version in reversed(peer["versions"].items()))
        text += f"""
{versions} reads the same files in bfloat16: {peer["pass_s"]:.2f} s a pass of two rows, with all of the
head; peak {peer["peak_bytes"] / 1e9:.1f} GB, the mapped files included.
"""
    return text


if __name__ == "__main__":
    main()
