# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Write small checkpoints with random weights in the released layout.

They hold the real vocabulary and every file of the real checkpoints, and draw noise: the tests run the commands
with them.
"""

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path

VISION_CONFIG = {
    "architectures": ["Emu3VisionVQModel"],
    "model_type": "Emu3VisionVQ",
    "ch": 32,
    "torch_dtype": "float32",
}
LANGUAGE_CONFIG = {
    "architectures": ["Emu3ForCausalLM"], "model_type": "Emu3", "hidden_size": 64, "intermediate_size": 160,
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2, "torch_dtype": "float32",
    "initializer_range": 0.2,  # wide enough for the random logits to depend on the prompt
}  # fmt: skip
CHECKPOINTS = ("Emu3-VisionTokenizer", "Emu3-Gen", "Emu3-Chat")


def write_vision_tokenizer(directory, config=VISION_CONFIG, min_pixels=64 * 64, max_pixels=192 * 192):
    import paddle

    from paddlemix.models.emu3 import Emu3VisionVQConfig, Emu3VisionVQModel
    from paddlemix.processors import Emu3VisionVQImageProcessor

    model = Emu3VisionVQModel(Emu3VisionVQConfig(**config))
    paddle.nn.initializer.Normal(0.0, 1.0)(model.quantize.embedding.weight)  # codes that can be told apart
    model.save_pretrained(directory)
    Emu3VisionVQImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels).save_pretrained(directory)


def write_language_model(directory, config=LANGUAGE_CONFIG):
    from paddlemix.models.emu3 import Emu3Config, Emu3ForCausalLM

    Emu3ForCausalLM(Emu3Config(**config)).save_pretrained(directory)
    write_vocabulary(directory)


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


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # this checkout's paddlemix, installed or not
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="where the checkpoints go, a folder each")
    directory = Path(parser.parse_args().directory)
    from paddlemix.machine import start_paddle

    start_paddle("cpu")
    import paddle

    paddle.seed(0)
    write_vision_tokenizer(directory / CHECKPOINTS[0])
    for name in CHECKPOINTS[1:]:
        write_language_model(directory / name)
    print("wrote " + ", ".join(str(directory / name) for name in CHECKPOINTS))
