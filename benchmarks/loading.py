# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Peak memory and time of loading a checkpoint: 2 billion parameters, float32 on disk, of another type in memory.

Writes 8.1 GB of shards in the released layout, once, and loads them in a process of its own; the peak is the operating
system's count.
"""

import math
from pathlib import Path

from machine import describe
from measure import call, timed

from paddlemix.machine import peak_host_memory

CONFIG = {
    "model_type": "Emu3", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 21,
    "num_attention_heads": 16, "num_key_value_heads": 4, "torch_dtype": "float32",
}  # fmt: skip
SHARD_BYTES = 2_000_000_000

TITLE = "Loading a checkpoint, float32 on disk"
HEADS = ["", "parameters", "loaded in", "from disk", "the model", "peak", "of the model", "peak before loading"]
TEXT = """\
The peak is of the whole process, by the operating system's count; the peak before loading is Python, Paddle and
PaddleNLP.
"""


def add_arguments(parser):
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])


def run(args, page):
    directory = args.directory / "loading"
    call(args, "ours", "loading.write", directory=directory, small=args.small)
    r = call(args, "ours", "loading.load", directory=directory, dtype=args.dtype)
    size = r["parameters"] * (4 if args.dtype == "float32" else 2)
    peak = f"{r['peak_bytes'] / 1e9:.2f} GB"
    row = [
        args.dtype, f"{r['parameters'] / 1e9:.2f} billion", f"{r['seconds']:.1f} s",
        f"{4 * r['parameters'] / 1e9 / r['seconds']:.2f} GB/s", f"{size / 1e9:.2f} GB", peak,
        f"{r['peak_bytes'] / size:.3f}", f"{r['base_bytes'] / 1e9:.2f} GB",
    ]  # fmt: skip
    page.put(TITLE, HEADS, [row], TEXT)
    page.put_machine([f"loading {args.dtype}"], describe(r["versions"]))
    yield args.dtype, True, r


def write(side, directory, small):
    from random_checkpoints import LANGUAGE_CONFIG, write_model

    write_model(directory, LANGUAGE_CONFIG if small else CONFIG, shard_bytes=SHARD_BYTES)


def load(side, directory, dtype):
    """{parameters, seconds, peak_bytes, base_bytes (before the checkpoint is touched)}"""
    from paddlemix.models.emu3 import Emu3ForCausalLM

    base = peak_host_memory()
    seconds, model = timed(lambda: Emu3ForCausalLM.from_pretrained(Path(directory), dtype=dtype))
    parameters = sum(math.prod(p.shape) for p in model.parameters())
    return {"parameters": parameters, "seconds": seconds, "peak_bytes": peak_host_memory(), "base_bytes": base}
