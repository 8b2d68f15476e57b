# Licensed under the Apache License, Version 2.0; see LICENSE.
"""PaddleNLP's second set of names for the norms. Paddle itself has operators of these names: none is registered."""

from emu3_ops import fused_ln as fast_ln  # noqa: F401
from emu3_ops import fused_rms_norm as fast_rms_norm  # noqa: F401
