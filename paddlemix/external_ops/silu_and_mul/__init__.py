# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The activation of the language model's MLP, with its gradient in one pass and nothing kept beside what is given."""

import paddle
import paddle.nn.functional as F

from .. import operators, wants_gradient


def silu_and_mul(gate, up):
    """silu(gate) * up (Shazeer, arXiv 2002.05202), of one shape and dtype; on a CPU in training by the operator."""
    if (ops := operators()) and gate.place.is_cpu_place() and gate.dtype == paddle.float32 and wants_gradient(gate, up):
        return ops.silu_and_mul(gate, up)
    return F.silu(gate) * up
