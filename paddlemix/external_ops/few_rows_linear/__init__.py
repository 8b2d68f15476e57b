# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A linear layer: on a CPU float32 activations and weights of 32, 16, 8 or 4 bits; on a card 16-bit
activations and weights of 8 or 4 bits.

With few rows the time goes into reading the weights, so the compiled operator reads them once, in the bits that they
are kept in. With many, as in a prompt, it goes into the products: of panels of weights, packed for all rows. Without
the operator the same is computed with Paddle, more slowly.

Where a CPU multiplies integers (AVX-512 VNNI, AVX-VNNI), activations are rounded too, with a scale for each 128 inputs
of a row: to 16 bits beside int8 and to 8 bits beside int4. Where it multiplies bfloat16 (AVX-512 BF16), those of more
than FEW_ROWS rows are rounded to bfloat16 beside bfloat16. That is no more than what the weights were rounded by.
`EMU3_OPS_SIMD=avx512` keeps activations float32. Where a gradient is wanted they are float32 in any case.
"""

import functools
import math

import numpy as np
import paddle
import paddle.nn.functional as F
from paddle.autograd import PyLayer

from paddlemix.utils import InputError

from .. import card_fault, operators, operators_for, wants_gradient
from ..float_product import float_product

FEW_ROWS = 64  # so many rows are computed while the weights are read once; more go by blocks
FEW_ROWS_WITHOUT = 16  # without the compiled operators, two rows a time
GROUP = 128  # inputs that share a scale in 4 bits
CHUNK = 1 << 24  # weights a time where they are widened with Paddle: never a whole large matrix in float32
TOLERANCE = 0.01  # of the largest result: what 16 bits round by is half of it
TINY = 1e-30  # a row or group of nothing larger becomes zeros: the inverse of its scale could overflow
FLOATS = (paddle.float32, paddle.bfloat16, paddle.float16)
IN_STEPS = 16  # of inputs, on a card
WITH_TENSOR_CORES = 8, 0  # compute capability


def few_rows():
    """So many rows of one call do not depend on each other: a row has the same bits alone and beside any others."""
    return FEW_ROWS if operators() else FEW_ROWS_WITHOUT


def few_rows_linear(x, weight, scale=None):
    """x times the transposed weight, without bias.

    Args:
        x: float32 [..., in]; with an int8 or uint8 weight float16 or bfloat16 as well, for a card.
        weight: float32 or bfloat16 [out, in]; or int8 [out, in] or uint8 [out, ceil(in / 128) * 64], as `quantize`
            gives them.
        scale: of int8 float32 [out], of uint8 float32 [out, ceil(in / 128)]; None for floats.

    Returns:
        [..., out], of x's dtype
    """
    if x.ndim == 0 or x.dtype not in (FLOATS if scale is not None else FLOATS[:1]):
        wanted = "float32" if scale is None else "float32, or 16-bit,"
        raise InputError(f"few_rows_linear takes {wanted} activations [..., in], got {x.dtype} {list(x.shape)}")
    _check(x.shape[-1], weight, scale)
    ops, training, on_cpu = operators_for(x), wants_gradient(x, weight), x.place.is_cpu_place()
    if ops and not training and (x.dtype == paddle.float32 if on_cpu else card_takes(x, weight)):
        return ops.few_rows_linear(x, weight, scale)
    rows = x.reshape([-1, x.shape[-1]])
    if ops and training and on_cpu and x.dtype == paddle.float32:
        y = _WithGradient.apply(rows, weight, scale)
    elif training and weight.stop_gradient:
        y = _BesideFrozen.apply(rows, weight, scale)
    else:
        y = _with_paddle(rows, weight, scale)
    return y.reshape([*x.shape[:-1], weight.shape[0]])


class _WithGradient(PyLayer):
    """The linear layer of rows [rows, in] for training on a CPU. A weight that wants no gradient costs none."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale, ctx.wanted = scale, [not tensor.stop_gradient for tensor in (x, weight)]
        return float_product(x, weight, scale)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensor()
        dx = dweight = None
        if ctx.wanted[0]:
            dx = float_product(dy, weight, ctx.scale, x.shape[1], weight_turned=True)
        if ctx.wanted[1]:
            dweight = float_product(dy, x, x_turned=True, weight_turned=True).astype(weight.dtype)
        return (dx, dweight) if ctx.scale is None else (dx, dweight, None)


class _BesideFrozen(PyLayer):
    """The same with Paddle, of a weight that wants no gradient: widened again in the backward pass, and never kept."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.weight, ctx.scale, ctx.columns = weight, scale, x.shape[1]
        return _with_paddle(x, weight, scale)

    @staticmethod
    def backward(ctx, dy):
        dx = 0
        for rows in _chunks([ctx.weight.shape[0], ctx.columns]):
            weight = ctx.weight[rows]
            weight = weight if ctx.scale is None else dequantize(weight, ctx.scale[rows], ctx.columns)
            dx = dx + paddle.matmul(dy[:, rows], weight.astype(dy.dtype))
        return (dx, None) if ctx.scale is None else (dx, None, None)


def quantize(weight, bits):
    """Round a weight to 8 or 4 bits, symmetrically and to the nearest.

    Args:
        weight: float32, bfloat16 or float16 [out, in].
        bits: 8: a scale for each output. 4: a scale for each output and group of 128 inputs.

    Returns:
        8 bits: int8 [out, in] of -127 to 127, scale float32 [out].
        4 bits: uint8 [out, ceil(in / 128) * 64], scale float32 [out, ceil(in / 128)]. Byte j of a group's 64 holds
        input j in its low and input j + 64 in its high four bits, -7 to 7 as 1 to 15; missing inputs are 0.
    """
    if bits not in (8, 4):
        raise InputError(f"weights are quantized to 8 or 4 bits, got {bits}")
    if weight.ndim != 2 or 0 in weight.shape or weight.dtype not in FLOATS:
        raise InputError(
            f"a weight to quantize must be float [out, in], not empty, got {weight.dtype} {list(weight.shape)}"
        )
    if weight.place.is_cpu_place() and (ops := operators()):
        weight, scale = ops.quantize_weight(weight, bits)
    else:
        pieces = [_quantize(weight[rows], bits) for rows in _chunks(weight.shape)]
        weight, scale = (paddle.concat(parts) if len(parts) > 1 else parts[0] for parts in zip(*pieces))
    if not bool(paddle.isfinite(scale).all()):
        raise InputError("a weight to quantize must be finite, this one holds NaN or infinity")
    return weight, scale


def dequantize(weight, scale, in_features):
    """What `quantize` gave, as float32 [out, in_features]."""
    _check(in_features, weight, scale)
    if weight.dtype == paddle.int8:
        return weight.astype("float32") * scale.unsqueeze(-1)
    out, groups = scale.shape
    high = (weight >> 4).astype("float32")
    low = weight.astype("float32") - 16.0 * high
    codes = paddle.concat([x.reshape([out, groups, GROUP // 2]) for x in (low, high)], axis=-1) - 8.0
    return (codes * scale.unsqueeze(-1)).reshape([out, groups * GROUP])[:, :in_features]


def card_takes(x, weight):
    """Whether the CUDA kernel computes this on the card, rightly."""
    fits = x.dtype != paddle.float32 and weight.dtype in (paddle.int8, paddle.uint8) and x.shape[-1] % IN_STEPS == 0
    return fits and kernel_fault(x.dtype, 8 if weight.dtype == paddle.int8 else 4, x.place.gpu_device_id()) is None


@functools.cache
def kernel_fault(dtype, bits, card):
    """Why the CUDA kernel for this dtype of activations is not used on a card; None where it is.

    It is compared with Paddle's product once, for each number of rows that it has a way for. What is wrong is logged.
    """
    kind = f"the int{bits} kernel"

    def compare():
        fault, place = None, paddle.CUDAPlace(card)
        weight = np.cos(np.arange(300 * 272, dtype=np.float32)).reshape([300, 272])
        quantized = quantize(paddle.to_tensor(weight, place=paddle.CPUPlace()), bits)
        weight, scale = (tensor.to(place) for tensor in quantized)
        for rows in (2, 16, 34, 70):
            x = np.sin(np.arange(rows * 272, dtype=np.float32)).reshape([rows, 272])
            x = paddle.to_tensor(x, place=place).astype(dtype)
            found = operators().few_rows_linear(x, weight, scale).astype("float32")
            right = paddle.matmul(x.astype("float32"), dequantize(weight, scale, 272), transpose_y=True)
            error = float((found - right).abs().max() / right.abs().max())
            if not error < TOLERANCE:
                fault = f"{kind} errs by {error:.2g} with {rows} rows on this card"
        return fault

    return card_fault(card, kind, compare, WITH_TENSOR_CORES, "Paddle's products")


def _check(in_features, weight, scale):
    dtype, given = weight.dtype, weight.shape
    columns, scales = in_features, None
    if dtype == paddle.int8:
        scales = given[:1]
    elif dtype == paddle.uint8:
        groups = math.ceil(in_features / GROUP)
        columns, scales = groups * GROUP // 2, [given[0], groups]
    elif dtype not in (paddle.float32, paddle.bfloat16):
        raise InputError(f"a weight must be float32, bfloat16, int8 or uint8 (4 bits), got {dtype}")
    if len(given) != 2 or given[1] != columns or 0 in given:
        raise InputError(
            f"a {dtype} weight for {in_features} inputs must be [out, {columns}], not empty, got {list(given)}"
        )
    got = None if scale is None else scale.shape
    if got != scales or (scale is not None and scale.dtype != paddle.float32):
        wanted = "None" if scales is None else f"float32 {list(scales)}"
        got = "None" if scale is None else f"{scale.dtype} {list(got)}"
        raise InputError(f"the scale of a {dtype} weight {list(given)} must be {wanted}, got {got}")


def _chunks(shape):
    step = max(1, CHUNK // max(1, shape[1]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _with_paddle(x, weight, scale):
    """x [rows, in] -> [rows, out]"""
    if weight.dtype == paddle.float32:
        return _product(x, weight)
    out = []
    for rows in _chunks([weight.shape[0], x.shape[1]]):
        part = weight[rows]
        part = part if scale is None else dequantize(part, scale[rows], x.shape[1])
        out.append(_product(x, part.astype(x.dtype)))
    return paddle.concat(out, axis=-1) if len(out) > 1 else out[0]


def _product(x, weight):
    """x [rows, in], weight of its dtype [out, in] -> [rows, out]

    Few float32 rows go in pairs, a row alone beside itself, so that each has the same bits whatever the others are.
    Paddle's matmul reads a weight at twice the rate when it comes first, and for one row at half the rate of two.
    """
    rows = x.shape[0]
    if rows == 0 or rows > FEW_ROWS_WITHOUT or x.dtype != paddle.float32:
        return paddle.matmul(x, weight, transpose_y=True)
    out = []
    for first in range(0, rows, 2):
        pair = x[first : first + 2]
        both = paddle.matmul(weight, pair if pair.shape[0] == 2 else pair.tile([2, 1]), transpose_y=True)
        # [out, 2] is turned by one dense copy: a tenth of the time of making a transposed view contiguous
        both = F.channel_shuffle(both.reshape([1, -1, 1, 1]), weight.shape[0]).reshape([2, -1])
        out.append(both[: pair.shape[0]])
    return paddle.concat(out) if len(out) > 1 else out[0]


def _quantize(weight, bits):
    weight = weight.astype("float32")
    largest, (out, columns) = 2 ** (bits - 1) - 1, weight.shape
    if bits == 4:
        padding = -columns % GROUP
        weight = (F.pad(weight, [0, 0, 0, padding]) if padding else weight).reshape([-1, GROUP])
    size = weight.abs().max(axis=-1)
    inverse = paddle.where(size < TINY, paddle.zeros_like(size), largest / size)
    codes = (weight * inverse.unsqueeze(-1)).round()
    scale = size / largest
    if bits == 8:
        return codes.astype("int8"), scale
    codes = (codes + 8.0).reshape([out, -1, 2, GROUP // 2])
    packed = codes[:, :, 0] + 16.0 * codes[:, :, 1]
    return packed.astype("uint8").reshape([out, -1]), scale.reshape([out, -1])
