# Licensed under the Apache License, Version 2.0; see LICENSE.
"""3 x 3 convolutions on a CPU with a quarter of the products, by Winograd's minimal filtering. Made for the vision
tokenizer, whose pictures lie with the channels last; without the operator oneDNN computes by the definition."""

from paddlemix.paddle_private import to_tensor
from paddlemix.utils import InputError

from .. import operators
from ..spatial_norm import norm_arguments

INPUTS, OUTPUTS = 16, 64  # the channels before and after are multiples of these


def takes(weight):
    """Whether the compiled operator is there, and computes with this weight [out, in, k, k]."""
    out, channels, *size = weight.shape
    return size == [3, 3] and channels % INPUTS == 0 and out % OUTPUTS == 0 and operators() is not None


def winograd_conv(x, weight, bias, out, add=False, doubled=False, norm=None):
    """Convolve pictures, padded by one zero on each side.

    Args:
        x: float32 array [height, width, in].
        weight, bias: float32 tensors [out, in, 3, 3] and [out].
        out: float32 array [height, width, out], which the result is written into.
        add: it is added to what is there.
        norm: a dict, what `spatial_norm` takes after x: it is applied to x first, and its result never in memory as a
            whole.
        doubled: every pixel of x is doubled in both directions first: `out` is of twice the height and width.

    Raises:
        InputError: `out` is not contiguous.
    """
    if not out.flags.c_contiguous:
        raise InputError("winograd_conv writes into `out`, which must be contiguous")
    weights, numbers = [None] * 4, [1, 0.0, False]
    if norm is not None:
        weights, numbers = norm_arguments(**norm)
    operators().winograd_conv(to_tensor(x), weight, bias, *weights, to_tensor(out), doubled, add, *numbers)
