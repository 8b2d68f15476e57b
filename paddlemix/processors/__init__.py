# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Pictures and text to model inputs, and back."""

from .emu3_processing import Emu3Processor
from .image_processing_emu3 import Emu3VisionVQImageProcessor

__all__ = ["Emu3Processor", "Emu3VisionVQImageProcessor"]
