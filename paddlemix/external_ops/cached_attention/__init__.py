# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention of new tokens over a cache of slots, on a CPU, without a matrix of all scores."""

import math

import paddle
import paddle.nn.functional as F

from paddlemix.utils import InputError

from .. import operators, wants_gradient

MOST_NEW = 64  # tokens of a row in one call that do not change each other's bits
CACHED = (paddle.float32, paddle.bfloat16, paddle.float16)


def cached_attention(query, key, value, lengths, slots=None, allowed=None):
    """Causal grouped-query attention of the last tokens of each row.

    Without `allowed` the result of a query is a function of its own keys alone, bit for bit: whatever the other rows,
    the other new tokens and the number of threads are. Only whether there are more than MOST_NEW of them decides. Where
    there are, and the processor multiplies bfloat16 (AVX-512 BF16), queries and weights are rounded to it beside a
    cache of bfloat16.

    Args:
        query: float32 [B, new, H, D], rotated and not scaled. Query i of row b sees the keys before
            lengths[b] - new + 1 + i.
        key, value: float32, bfloat16 or float16 [S, kv, capacity, D], a cache of S slots.
        lengths: int64 [B] on the CPU: tokens of each row in all, the new ones with them.
        slots: int64 [B] on the CPU: the slot of the cache that each row is in; None: row b in slot b, and S is B.
        allowed: bool [B, max(lengths)], False at padding; None where there is none. A query that sees no key gives the
            mean of all values of its row.

    Returns:
        float32 [B, new, H * D]

    Raises:
        InputError: A shape, dtype, length or slot is not as above.
    """
    _check(query, key, value, lengths, slots, allowed)
    if (ops := operators()) and not wants_gradient(query, key, value):
        return ops.cached_attention(query, key, value, lengths, slots, allowed)
    if allowed is None:
        return _by_token(query, key, value, lengths, slots)
    return _with_mask(query, key, value, lengths, slots, allowed)


def _check(query, key, value, lengths, slots, allowed):
    given, kept = list(query.shape), list(key.shape)
    if len(given) != 4 or len(kept) != 4 or list(value.shape) != kept or 0 in given or 0 in kept:
        raise InputError(
            f"query must be [B, new, H, D], key and value [S, kv, capacity, D], none empty, got {given}, {kept} and "
            f"{list(value.shape)}"
        )
    if given[3] != kept[3] or given[2] % kept[1]:
        raise InputError(f"query {given} and key {kept} must agree in D, and H be a multiple of kv")
    if query.dtype != paddle.float32 or key.dtype not in CACHED or value.dtype != key.dtype:
        raise InputError(
            "query must be float32, key and value both float32, bfloat16 or float16, got "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    batch, new = given[:2]
    for name, rows in (("lengths", lengths), ("slots", slots)):
        if rows is not None and not _is_rows(rows, batch):
            raise InputError(f"{name} must be int64 [{batch}] on the CPU, got {rows.dtype} {list(rows.shape)}")
    if slots is None and batch != kept[0]:
        raise InputError(f"without slots the cache must have one for each of {batch} rows, got {kept}")
    numbers = lengths.tolist()
    if min(numbers) < new or max(numbers) > kept[2]:
        raise InputError(f"lengths must be {new} (the new tokens) to {kept[2]} (the capacity), got {numbers}")
    if slots is not None and not all(0 <= slot < kept[0] for slot in slots.tolist()):
        raise InputError(f"slots must be 0 to {kept[0] - 1}, got {slots.tolist()}")
    if allowed is not None and (allowed.dtype != paddle.bool or list(allowed.shape) != [batch, max(numbers)]):
        raise InputError(f"allowed must be bool {[batch, max(numbers)]}, got {allowed.dtype} {list(allowed.shape)}")


def _is_rows(tensor, batch):
    return tensor.dtype == paddle.int64 and list(tensor.shape) == [batch] and tensor.place.is_cpu_place()


def _by_token(query, key, value, lengths, slots):
    """One query at a time over exactly the keys that it sees."""
    batch, new, heads, dim = query.shape
    slots = range(batch) if slots is None else slots.tolist()
    query = (query / math.sqrt(dim)).reshape([batch, new, key.shape[1], -1, dim])
    rows = []
    for row, slot, length in zip(query, slots, lengths.tolist()):
        keys, values = (x[slot, :, :length].astype("float32") for x in (key, value))
        for i in range(new):
            seen = length - new + 1 + i
            scores = paddle.matmul(row[i], keys[:, :seen], transpose_y=True)  # [kv, heads / kv, seen]
            rows.append(paddle.matmul(F.softmax(scores, axis=-1), values[:, :seen]))
    return paddle.stack(rows).reshape([batch, new, heads * dim])


def _with_mask(query, key, value, lengths, slots, allowed):
    """All queries at once. Where a query sees nothing the scores of its row are one number, but for what is behind."""
    batch, new, heads, dim = query.shape
    kv_heads, longest = key.shape[1], allowed.shape[1]
    key, value = (x[:, :, :longest].astype("float32") for x in (key, value))
    if slots is not None:
        key, value = (paddle.index_select(x, slots) for x in (key, value))
    query = (query / math.sqrt(dim)).reshape([batch, new, kv_heads, -1, dim]).transpose([0, 2, 3, 1, 4])
    scores = paddle.matmul(query.reshape([batch, kv_heads, -1, dim]), key, transpose_y=True)
    places, ends = paddle.arange(longest), lengths.unsqueeze(-1)  # [longest], [B, 1]
    visible = places <= (ends - new + paddle.arange(new)).unsqueeze(-1)  # [B, new, longest]
    visible = paddle.logical_and(visible, allowed.unsqueeze(1))
    ceiling = (visible.astype("float32") - 0.5) * 2e30 - (places >= ends).astype("float32").unsqueeze(1) * 2e30
    scores = paddle.minimum(scores.reshape([batch, kv_heads, -1, new, longest]), ceiling.unsqueeze([1, 2]))
    value = paddle.where((places < ends).unsqueeze([1, -1]), value, paddle.zeros_like(value))  # not used: may be NaN
    weights = F.softmax(scores, axis=-1).reshape([batch, kv_heads, -1, longest])
    out = paddle.matmul(weights, value).reshape([batch, kv_heads, heads // kv_heads, new, dim])
    return out.transpose([0, 3, 1, 2, 4]).reshape([batch, new, heads * dim])
