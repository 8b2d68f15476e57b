# Licensed under the Apache License, Version 2.0; see LICENSE.
"""A decoder layer for new tokens over the cache in one call: a step of many small operators spends as long between
them as in reading the weights of a small model. The model computes the same with the others.

On a CPU activations are float32; on a card they are of 16 bits, and so is what is kept between its launches.
"""

import functools
import math

import numpy as np
import paddle
import paddle.nn.functional as F

from paddlemix.utils import InputError

from .. import card_fault, operators
from ..few_rows_linear import IN_STEPS, WITH_TENSOR_CORES, dequantize, quantize

DIM_STEPS, MOST_DIM = 16, 256  # of a head, on a card
TOLERANCE = {paddle.float16: 0.004, paddle.bfloat16: 0.03}  # of the largest result: what 16 bits round by is half of it


def decoder_step(x, norms, weights, scales, cosine, sine, key, value, lengths, slots, epsilon, allowed=None):
    """x + attention(norm(x)), and of that x + mlp(norm(x)). The compiled operator is needed; gives no gradient.

    On a CPU the result of a row, of its window's first tokens too, is a function of itself alone for up to FEW_ROWS
    rows and tokens in all, and of a row with more new tokens, a part of a prompt, too.

    Args:
        x: float32 [B, new, hidden], the last of the tokens of each row; on a card float16 or bfloat16, at most FEW_ROWS
            tokens in all, where `card_takes` them.
        norms: before attention and before the MLP, float32, bfloat16 or float16 [hidden]; on a card of x's dtype.
        weights: of q, k, v, o, gate, up and down, each as few_rows_linear takes it, all of one dtype; on a card of x's
            dtype, int8 or uint8.
        scales: of the seven, for int8 and uint8 weights; None for floats.
        cosine, sine: of the rotary angles, float32 [1 or B, new, 1, D], as attention.Rotary doubles them.
        key, value: the cache, as cached_attention takes it; on a card of x's dtype. **The new tokens are written into
            it**, those of row b at lengths[b] - new of slot slots[b].
        lengths, slots: as cached_attention takes them, no slot twice; on a card int64 [B] there, and not looked at.
        allowed: bool [B, max(lengths)], False at padding; None where there is none, and on a card.

    Returns:
        [B, new, hidden], of x's dtype

    Raises:
        InputError: The cache is a view, which Paddle would copy.
    """
    if not (key.is_contiguous() and value.is_contiguous()):
        raise InputError("decoder_step writes into the cache, whose keys and values must be contiguous: views are not")
    return operators().decoder_step(
        x, norms, weights, scales, cosine, sine, key, value, lengths, slots, allowed, epsilon
    )


def card_takes(x, norms, weights, key):
    """Whether the CUDA kernels compute such a layer on the card that x is on, rightly."""
    dtype, weight, dim = x.dtype, weights[0], key.shape[-1]
    if dtype not in TOLERANCE or weight.dtype not in (dtype, paddle.int8, paddle.uint8) or key.dtype != dtype:
        return False
    if any(norm.dtype != dtype for norm in norms) or dim % DIM_STEPS or dim > MOST_DIM:
        return False
    if x.shape[-1] % IN_STEPS or weights[4].shape[0] % IN_STEPS:
        return False
    return step_fault(dtype, weight.dtype, dim, x.place.gpu_device_id()) is None


@functools.cache
def step_fault(dtype, weight_dtype, dim, card):
    """Why the CUDA kernels for these dtypes and heads of `dim` are not used on a card; None where they are.

    They are compared with Paddle's operators once, for each number of rows that they have a way for. What is wrong is
    logged.
    """
    names = [str(name).removeprefix("paddle.").replace("uint8", "int4") for name in (dtype, weight_dtype)]
    kind = f"the decoder step in {names[0]} with {names[1]} weights"

    def compare():
        fault = None
        for lengths, new in (([270], 1), ([600, 17], 1), ([300], 17), ([530, 40], 17)):
            given = _example(lengths, new, dtype, weight_dtype, dim, paddle.CUDAPlace(card))
            right = _with_paddle(*given)
            found = decoder_step(*given), given[6], given[7]  # the cache, which is written
            error = max(float((a.astype("float32") - b).abs().max() / b.abs().max()) for a, b in zip(found, right))
            if not error < TOLERANCE[dtype]:
                fault = f"{kind} errs by {error:.2g} with {len(lengths) * new} rows on this card"
        return fault

    return card_fault(card, kind, compare, WITH_TENSOR_CORES)


def _example(lengths, new, dtype, weight_dtype, dim, place):
    """The arguments of a small layer: four query heads to a key head, slots out of order, two slices of keys."""
    rng, batch, hidden, inner, kv_heads = np.random.default_rng(0), len(lengths), 272, 400, 2
    queries, keys = 4 * kv_heads * dim, kv_heads * dim

    def random(*shape, at=0.0, size=1.0):
        return paddle.to_tensor((at + size * rng.standard_normal(shape)).astype(np.float32), place=paddle.CPUPlace())

    def on_card(tensor, to=None):
        return tensor.to(place) if to is None else tensor.to(place).astype(to)

    weights, scales = [], []
    for out, inputs in ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries), (inner, hidden),
                        (inner, hidden), (hidden, inner)):  # fmt: skip
        weight = random(out, inputs, size=1 / math.sqrt(inputs))
        if weight_dtype == dtype:
            weights.append(on_card(weight, dtype))
        else:
            weight, scale = quantize(weight, 8 if weight_dtype == paddle.int8 else 4)
            weights.append(on_card(weight))
            scales.append(on_card(scale))
    angles = random(batch, new, 1, dim // 2, size=3.0)
    cosine, sine = paddle.cos(angles), paddle.sin(angles)
    return (
        on_card(random(batch, new, hidden), dtype), [on_card(random(hidden, at=1.0), dtype) for _ in range(2)], weights,
        scales or None, on_card(paddle.concat([cosine, cosine], -1)), on_card(paddle.concat([-sine, sine], -1)),
        *(on_card(random(batch + 1, kv_heads, max(lengths) + 3, dim), dtype) for _ in "kv"),
        *(paddle.to_tensor(x, "int64", place=place) for x in (lengths, [batch, *range(batch - 1)])), 1e-5,
    )  # fmt: skip


def _with_paddle(x, norms, weights, scales, cosine, sine, key, value, lengths, slots, epsilon):
    """(what decoder_step gives, the keys, the values after it), in float32."""
    batch, new, _ = x.shape
    kv_heads, _, dim = key.shape[1:]
    x, key, value = (tensor.astype("float32") for tensor in (x, key, value))

    def linear(x, i):
        weight = weights[i].astype("float32") if scales is None else dequantize(weights[i], scales[i], x.shape[-1])
        return paddle.matmul(x, weight, transpose_y=True)

    def norm(x, scale):
        return x * paddle.rsqrt((x * x).mean(axis=-1, keepdim=True) + epsilon) * scale.astype("float32")

    h = norm(x, norms[0])
    query, new_key, new_value = (linear(h, i).reshape([batch, new, -1, dim]) for i in range(3))
    query, new_key = (y * cosine + y.roll(dim // 2, axis=-1) * sine for y in (query, new_key))
    attended = []
    for row, (length, slot) in enumerate(zip(lengths.tolist(), slots.tolist())):
        for cache, rows in ((key, new_key), (value, new_value)):
            cache[slot, :, length - new : length] = rows[row].transpose([1, 0, 2])
        grouped = query[row].reshape([new, kv_heads, -1, dim]).transpose([1, 2, 0, 3])  # [kv_heads, group, new, dim]
        scores = paddle.matmul(grouped, key[slot, :, :length].unsqueeze(1), transpose_y=True) / math.sqrt(dim)
        hidden = paddle.triu(paddle.full([new, length], -1e30), length - new + 1)
        out = paddle.matmul(F.softmax(scores + hidden, axis=-1), value[slot, :, :length].unsqueeze(1))
        attended.append(out.transpose([2, 0, 1, 3]).reshape([new, -1]))
    x = x + linear(paddle.stack(attended), 3)
    h = norm(x, norms[1])
    return x + linear(F.silu(linear(h, 4)) * linear(h, 5), 6), key, value
