# Licensed under the Apache License, Version 2.0; see LICENSE.
"""RMS norm and layer norm over the last axis in one pass, with gradients; in PaddleNLP's conventions.

The arithmetic is in float32 or better, and the result has the dtype of `scale`, rounded once.
"""

import paddle

from paddlemix.utils import InputError

from .. import operators_for

FLOATS = (paddle.float32, paddle.float16, paddle.bfloat16)


def fused_rms_norm(x, scale, epsilon):
    """x / sqrt(mean(x * x) + epsilon) * scale

    Args:
        x: float32, float16 or bfloat16 [..., cols].
        scale: [cols], any of these dtypes.

    Returns:
        y [..., cols] in the dtype of scale, and 1 / sqrt(...), float32 [...], without gradient.
    """
    _check(x, scale)
    if ops := operators_for(x, scale):
        y, rstd = ops.fused_rms_norm(x, scale, epsilon)
        return y, rstd.detach()
    wide = x.astype("float32")
    rstd = _rsqrt((wide * wide).mean(axis=-1) + epsilon)
    return (wide * rstd.unsqueeze(-1) * scale.astype("float32")).astype(scale.dtype), rstd.detach()


def fused_ln(x, scale, bias, epsilon):
    """(x - mean(x)) / sqrt(var(x) + epsilon) * scale + bias

    Args:
        x: float32, float16 or bfloat16 [..., cols].
        scale, bias: [cols], any of these dtypes, both the same.

    Returns:
        y [..., cols] in the dtype of scale; mean and 1 / sqrt(...), float32 [...], without gradient.
    """
    _check(x, scale, bias)
    if ops := operators_for(x, scale, bias):
        y, mean, rstd = ops.fused_ln(x, scale, bias, epsilon)
        return y, mean.detach(), rstd.detach()
    wide = x.astype("float32")
    mean = wide.mean(axis=-1)
    centred = wide - mean.unsqueeze(-1)
    rstd = _rsqrt((centred * centred).mean(axis=-1) + epsilon)
    y = centred * rstd.unsqueeze(-1) * scale.astype("float32") + bias.astype("float32")
    return y.astype(scale.dtype), mean.detach(), rstd.detach()


def _rsqrt(x):
    """In float64: of float32 the last bit of Paddle's rsqrt and sqrt depends on a value's place in the tensor."""
    return (1 / paddle.sqrt(x.astype("float64"))).astype("float32")


def _check(x, *parameters):
    if x.dtype not in FLOATS or x.ndim == 0 or x.shape[-1] == 0:
        raise InputError(
            f"a norm takes float32, float16 or bfloat16 [..., cols], cols not 0, got {x.dtype} {list(x.shape)}"
        )
    for given in parameters:
        if given.dtype not in FLOATS or given.dtype != parameters[0].dtype or list(given.shape) != [x.shape[-1]]:
            raise InputError(
                f"scale and bias must be float [{x.shape[-1]}] of one dtype, got {given.dtype} {list(given.shape)}"
            )
