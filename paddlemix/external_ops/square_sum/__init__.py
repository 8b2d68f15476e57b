# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The sum of the squares of a tensor, for the norm of gradients."""

import paddle

from .. import operators


def square_sum(x):
    """The sum of the squares of float32 numbers, a float; on a CPU in double."""
    if (ops := operators()) and x.place.is_cpu_place() and x.dtype == paddle.float32:
        return ops.square_sum(x).item()
    return float((x * x).sum())
