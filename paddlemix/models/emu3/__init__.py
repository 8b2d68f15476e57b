# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3: the vision tokenizer, the language model, and what turns pictures and text into tokens and back.

Names are imported when they are first used, so that a command's `--help` does not wait for Paddle.
"""

import importlib

_HOME = {
    "Emu3Config": "configuration_emu3",
    "Emu3VisionVQConfig": "configuration_emu3",
    "Emu3VisionVQModel": "modeling_emu3visionvq",
    "Emu3Model": "modeling_emu3",
    "Emu3ForCausalLM": "modeling_emu3",
    "Emu3Tokenizer": "tokenization_emu3",
    "ImageGrammar": "image_grammar",
    "Sampling": "sampling",
    "Drawing": "sequences",
    "Answer": "sequences",
    "Batch": "decoding",
    "generate_images": "generation_emu3",
    "generate_text": "generation_emu3",
}
__all__ = list(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
