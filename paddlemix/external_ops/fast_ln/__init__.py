# Licensed under the Apache License, Version 2.0; see LICENSE.
"""PaddleNLP's second set of names for the same two norms."""

from ..fused_ln import fused_ln as fast_ln
from ..fused_ln import fused_rms_norm as fast_rms_norm

__all__ = ["fast_ln", "fast_rms_norm"]
