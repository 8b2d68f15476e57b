# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Emu3, BAAI's native multimodal model, on PaddlePaddle."""

__version__ = "0.1.0"
