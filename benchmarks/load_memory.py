# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Peak memory and time of loading a checkpoint: 2 billion parameters, float32 on disk, float16 in memory.

Writes 8.1 GB of shards in the released layout into a temporary folder (or --directory, which is kept), loads them
in a process of its own, and prints what the operating system counted for it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

CONFIG = {"model_type": "Emu3", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 21,
          "num_attention_heads": 16, "num_key_value_heads": 4}  # fmt: skip
SHARD_BYTES = 2_000_000_000


def write(directory):
    """Random values in the released layout, several shards and an index."""
    import numpy as np
    import paddle
    from safetensors.numpy import save_file

    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM

    config = Emu3Config(**CONFIG)
    with paddle.LazyGuard():
        state = Emu3ForCausalLM(config).state_dict()
    shapes = {name: list(t.shape) for name, t in state.items()}
    shards, size = [[]], 0
    for name, shape in shapes.items():
        if size + 4 * math.prod(shape) > SHARD_BYTES:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += 4 * math.prod(shape)
    rng, weight_map = np.random.default_rng(0), {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        arrays = {name: rng.random(shapes[name], dtype=np.float32) * 0.1 - 0.05 for name in names}
        save_file(arrays, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config.save_pretrained(directory)


def load(directory, dtype):
    """In a process of its own: {parameters, seconds, peak_bytes, base_bytes (before the checkpoint is touched)}"""
    from paddlemix.machine import peak_host_memory
    from paddlemix.models.emu3 import Emu3ForCausalLM

    base = peak_host_memory()
    start = time.perf_counter()
    model = Emu3ForCausalLM.from_pretrained(directory, dtype=dtype)
    seconds = time.perf_counter() - start
    parameters = sum(math.prod(p.shape) for p in model.parameters())
    peak = peak_host_memory()
    print(json.dumps({"parameters": parameters, "seconds": seconds, "peak_bytes": peak, "base_bytes": base}))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where the checkpoint is, or is written and kept")
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--load_only", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.load_only:
        return load(args.directory, args.dtype)
    with tempfile.TemporaryDirectory() as temporary:
        directory = args.directory or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        if not (directory / "config.json").exists():
            write(directory)
        command = [sys.executable, "-W", "ignore", __file__, "--load_only", f"--directory={directory}"]
        result = subprocess.run([*command, f"--dtype={args.dtype}"], stdout=subprocess.PIPE, text=True, check=True)
    r = json.loads(result.stdout)
    size = r["parameters"] * (4 if args.dtype == "float32" else 2)
    print(f"{r['parameters'] / 1e9:.2f} billion parameters, float32 on disk, {size / 1e9:.2f} GB in {args.dtype}")
    print(f"loaded in {r['seconds']:.1f} s, {4 * r['parameters'] / 1e9 / r['seconds']:.2f} GB a second from disk")
    print(f"peak of the process {r['peak_bytes'] / 1e9:.2f} GB = {r['peak_bytes'] / size:.3f} times the model")
    print(f"({r['base_bytes'] / 1e9:.2f} GB of it are Python, Paddle and PaddleNLP before the checkpoint is touched)")


if __name__ == "__main__":
    main()
