# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The vision tokenizer's norm of pictures with the channels last, on a CPU, in one pass after that for its moments."""

import numpy as np

from paddlemix.paddle_private import to_tensor
from paddlemix.utils import InputError

from .. import operators


def spatial_norm(x, weight, bias, groups, epsilon, scale=None, shift=None, silu=False, out=None):
    """Group norm, times `scale` plus `shift` where they are given; of that x * sigmoid(x) with `silu`. The compiled
    operator is needed.

    Args:
        x: float32 array [height, width, channels].
        weight, bias: of the group norm, float32 tensors [channels].
        scale, shift: float32 arrays [height / n, width / n, channels], each of whose places is one for n x n pixels.

        out: float32 array as x, contiguous, which the result is written into; a new one where it is not given.

    Returns:
        `out`.

    Raises:
        InputError: `out` is not contiguous.
    """
    if out is None:
        out = np.empty(x.shape, x.dtype)  # contiguous, whatever x is
    if not out.flags.c_contiguous:
        raise InputError("spatial_norm writes into `out`, which must be contiguous")
    weights, numbers = norm_arguments(weight, bias, groups, epsilon, scale, shift, silu)
    operators().spatial_norm(to_tensor(x), *weights, to_tensor(out), *numbers)
    return out


def norm_arguments(weight, bias, groups, epsilon, scale=None, shift=None, silu=False):
    """Of a compiled operator: tensors, and numbers."""
    latent = [None if array is None else to_tensor(array) for array in (scale, shift)]
    return [weight, bias, *latent], [groups, epsilon, silu]
