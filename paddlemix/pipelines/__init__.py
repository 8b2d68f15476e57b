# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Everything at once: text and pictures in, text and pictures out."""

from .emu3 import Emu3Pipeline

__all__ = ["Emu3Pipeline"]
