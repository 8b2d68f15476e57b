# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Products of float32 matrices as training needs them, on a CPU: activations are never rounded."""

import paddle

from .. import operators


def float_product(x, weight, scale=None, columns=None, x_turned=False, weight_turned=False, into=None, add=True):
    """x times the transposed weight, as few_rows_linear; either may be turned. The caller asks `operators()` first.

    Args:
        x: float32 [rows, depth] on the CPU; turned, [depth, rows].
        weight, scale: of [out, depth], or, turned, of [depth, out], as few_rows_linear takes them.
        columns: out, where a turned weight is of 4 bits.
        into: float32 [rows, out], which the result is written into; None for a new one.
        add: it is added to what is there.

    Returns:
        float32 [rows, out]
    """
    if into is None:
        out = columns or weight.shape[1 if weight_turned else 0]
        into, add = paddle.empty([x.shape[1 if x_turned else 0], out], "float32"), False
    return operators().float_product(x, weight, scale, into, x_turned, weight_turned, add)
