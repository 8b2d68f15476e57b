# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The compiled operators under the name by which PaddleNLP imports them."""

from emu3_ops import fused_ln, fused_rms_norm  # noqa: F401
