# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write checkpoints with random weights in the released layout, for tests and benchmarks.

As a program it writes three small ones that hold the real vocabulary and every file of the released ones.
"""

import argparse
import importlib.util
import json
import math
import shutil
import sys
import warnings
import zlib
from pathlib import Path

import ml_dtypes  # noqa: F401  makes numpy know bfloat16
import numpy as np

VISION_CONFIG = {
    "architectures": ["Emu3VisionVQModel"], "model_type": "Emu3VisionVQ", "ch": 32, "torch_dtype": "float32",
}  # fmt: skip
LANGUAGE_CONFIG = {
    "architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "torch_dtype": "float32",
}  # fmt: skip
CHECKPOINTS = ("Emu3-VisionTokenizer", "Emu3-Gen", "Emu3-Chat")
SHARD_BYTES = 5_000_000_000
SPARE_BYTES = 2 << 30  # left free on the disk
PART = 1 << 22  # random numbers made at a time
LATENT_MEAN = np.float32([-0.07, -0.05, -0.05, -0.15])  # of the latents that these weights make of an image


def write_vision_tokenizer(directory, config=VISION_CONFIG, min_pixels=64 * 64, max_pixels=192 * 192, seed=0):
    """A vision tokenizer and its preprocessor_config.json."""
    from paddlemix.processors import Emu3VisionVQImageProcessor

    write_model(directory, config, seed)
    Emu3VisionVQImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels).save_pretrained(directory)


def write_language_model(directory, config=LANGUAGE_CONFIG, seed=0):
    """A language model and its tokenizer's files."""
    write_model(directory, config, seed)
    write_vocabulary(directory)


def write_model(directory, config, seed=0, shard_bytes=SHARD_BYTES):
    """Weights and config.json, unless they are there already.

    `config`: a dict as in config.json; "model_type" and "torch_dtype" (float32 or bfloat16) must be in it. Weights of
    more than `shard_bytes` are written as shards with an index. The program ends if the disk lacks room for them.
    """
    import paddle

    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM, Emu3VisionVQConfig, Emu3VisionVQModel
    from paddlemix.models.emu3.safetensors_file import write_safetensors

    directory = Path(directory)
    if (directory / "config.json").exists():  # written last: all else is there
        return
    is_language_model, dtype = config["model_type"] == "Emu3", config["torch_dtype"]
    config = (Emu3Config if is_language_model else Emu3VisionVQConfig)(**config)
    with paddle.LazyGuard():  # shapes without weights
        state = (Emu3ForCausalLM if is_language_model else Emu3VisionVQModel)(config).state_dict()
    layout = {name: ("int64" if name.endswith("num_batches_tracked") else dtype, t.shape) for name, t in state.items()}
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (dtype, shape) in layout.items()}
    total = sum(sizes.values())
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < total + SPARE_BYTES:
        sys.exit(f"{directory} needs {total / 1e9:.1f} GB and 2 GB to spare, {free / 1e9:.1f} GB are free")
    shards, size = [[]], 0
    for name in layout:
        if size + sizes[name] > shard_bytes:
            shards, size = [*shards, []], 0
        shards[-1].append(name)
        size += sizes[name]
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    files = files if len(files) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards):
        part = {name: layout[name] for name in names}
        write_safetensors(directory / file, part, lambda name: random_tensor(name, *layout[name], seed))
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}  # transformers needs the size
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def random_tensor(name, dtype, shape, seed=0):
    """A numpy array, scaled so that signals keep their size from layer to layer and every layer matters.

    With smaller weights greedy decoding would repeat its last token, and equal tokens would show little.
    """
    if dtype == "int64":
        return np.ones(shape, np.int64)
    rng = np.random.default_rng(zlib.crc32(name.encode(), seed))
    draw, scale, mean = rng.standard_normal, np.float32(1), np.float32(0)
    if name.endswith("running_var"):
        draw, mean = rng.random, np.float32(0.5)
    elif name == "quantize.embedding.weight":  # around the latents, so that an image has many codes
        scale, mean = np.float32(0.1), LATENT_MEAN
    elif len(shape) == 1:
        scale, mean = np.float32(0.1), np.float32(name.endswith("weight"))  # a norm's weight is near 1
    elif "embed_tokens" not in name:  # kernels
        scale = np.float32(1 / math.sqrt(math.prod(shape[1:])))
    out = np.empty(math.prod(shape), dtype)
    for start in range(0, out.size, PART):  # a large tensor is not held in float32
        part = draw(min(PART, out.size - start), dtype=np.float32).reshape(-1, mean.size) * scale + mean
        out[start : start + part.size] = part.reshape(-1)
    return out.reshape(shape)


def write_vocabulary(directory):
    """The tokenizer's files; the ordinary tokens are Qwen's, which PyPI's package dashscope carries."""
    package = importlib.util.find_spec("dashscope")
    if package is None:
        sys.exit("error: the vocabulary comes with the package dashscope: pip install -r requirements-dev.txt")
    directory = Path(directory)
    shutil.copyfile(Path(package.origin).parent / "resources" / "qwen.tiktoken", directory / "emu3.tiktoken")
    tokens = ["<|image token|>", "<|image start|>", "<|image end|>"]
    tokens += [f"<|visual token {code:06d}|>" for code in range(32768)]
    (directory / "emu3_vision_tokens.txt").write_text("".join(f"{t}\n" for t in tokens))
    config = {
        "bos_token": "<|extra_203|>", "eos_token": "<|extra_204|>", "pad_token": "<|endoftext|>",
        "model_max_length": 9216, "padding_side": "left", "tokenizer_class": "Emu3Tokenizer",
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the checkpoints go, a folder each")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout's paddlemix, installed or not
    warnings.simplefilter("ignore")  # Paddle's notices when it is imported
    write_vision_tokenizer(args.directory / CHECKPOINTS[0], seed=args.seed)
    for name in CHECKPOINTS[1:]:
        write_language_model(args.directory / name, seed=args.seed)
    print("wrote " + ", ".join(str(args.directory / name) for name in CHECKPOINTS))


if __name__ == "__main__":
    main()
