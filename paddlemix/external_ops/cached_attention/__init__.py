# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention of few new tokens over the fixed cache, on a CPU. Keys and values of 16 bits are widened on the way."""

import math

import paddle
import paddle.nn.functional as F

from paddlemix.utils import InputError

from .. import operators, wants_gradient

MOST_NEW = 16  # tokens
CACHED = (paddle.float32, paddle.bfloat16, paddle.float16)


def cached_attention(query, key, value, length, allowed=None):
    """Causal grouped-query attention of the last of `length` tokens.

    Args:
        query: float32 [B, new, H, D], `new` 1 to 16, rotated and not scaled. Query i sees the keys before
            length - new + 1 + i.
        key, value: float32, bfloat16 or float16 [B, kv, room, D], the cache: `length` tokens are in it.
        length: tokens in all, the new ones with them.
        allowed: bool [B, length], False at padding; None where there is none. A query that sees no key gives the mean
            of all `length` values.

    Returns:
        float32 [B, new, H * D]
    """
    _check(query, key, value, length, allowed)
    if (ops := operators()) and not wants_gradient(query, key, value):
        return ops.cached_attention(query, key, value, allowed, length)
    return _with_paddle(query, key, value, length, allowed)


def _check(query, key, value, length, allowed):
    given, kept = list(query.shape), list(key.shape)
    if len(given) != 4 or len(kept) != 4 or list(value.shape) != kept or 0 in given or 0 in kept:
        raise InputError(
            f"query must be [B, new, H, D], key and value [B, kv, room, D], none empty, got {given}, {kept} and "
            f"{list(value.shape)}"
        )
    if given[0] != kept[0] or given[3] != kept[3] or given[2] % kept[1]:
        raise InputError(f"query {given} and key {kept} must agree in B and D, and H be a multiple of kv")
    if query.dtype != paddle.float32 or key.dtype not in CACHED or value.dtype != key.dtype:
        raise InputError(
            "query must be float32, key and value both float32, bfloat16 or float16, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not given[1] <= length <= kept[2]:
        raise InputError(f"length must be {given[1]} (the new tokens) to {kept[2]} (the room), got {length}")
    if allowed is not None and (allowed.dtype != paddle.bool or list(allowed.shape) != [given[0], length]):
        raise InputError(f"allowed must be bool {[given[0], length]}, got {allowed.dtype} {list(allowed.shape)}")


def _with_paddle(query, key, value, length, allowed):
    batch, new, heads, dim = query.shape
    kv_heads = key.shape[1]
    key, value = (x[:, :, :length].astype("float32") for x in (key, value))
    query = (query / math.sqrt(dim)).reshape([batch, new, kv_heads, -1, dim]).transpose([0, 2, 3, 1, 4])
    scores = paddle.matmul(query.reshape([batch, kv_heads, -1, dim]), key, transpose_y=True)
    visible = paddle.arange(length) <= paddle.arange(length - new, length).unsqueeze(-1)
    visible = visible if allowed is None else paddle.logical_and(visible, allowed.unsqueeze(1))
    ceiling = (visible.astype("float32") - 0.5) * 2e30
    ceiling = ceiling.reshape([-1, 1, 1, new, length])
    scores = paddle.minimum(scores.reshape([batch, kv_heads, -1, new, length]), ceiling)
    weights = F.softmax(scores, axis=-1).reshape([batch, kv_heads, -1, length])
    out = paddle.matmul(weights, value).reshape([batch, kv_heads, heads // kv_heads, new, dim])
    return out.transpose([0, 3, 1, 2, 4]).reshape([batch, new, heads * dim])
