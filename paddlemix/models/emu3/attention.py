# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention: rotary positions, masks, and the one function that attends."""

import math
from functools import cached_property

import paddle
import paddle.nn.functional as F
from paddle.nn.functional.flash_attention import flash_attention

from paddlemix.external_ops import operators, wants_gradient
from paddlemix.external_ops.cached_attention import cached_attention
from paddlemix.external_ops.causal_attention import causal_attention
from paddlemix.utils import InputError

QUERY_CHUNK = 512  # queries a time of the plain attention: never a whole [length, length] matrix
VECTOR = 16  # float32 numbers, the most that a CPU computes at once
FEW_TOKENS = 32  # of a decoding step: what all layers share is made once, in full, for so many new tokens


class Rotary:
    """Rotary positions (Su et al., arXiv 2104.09864) of new tokens: their angles, made once for all layers.

    Args:
        config: Emu3Config.
        position_ids: int64 [rows or 1, new].
        length: how many tokens there are in all, which decides the base of the dynamic (NTK-aware) scaling: a number,
            or float64 [rows or 1, new] for each token.
    """

    def __init__(self, config, position_ids, length):
        base, dim = paddle.full([1], config.rope_theta, "float64"), config.head_dim
        scaling = config.rope_scaling or {}
        positions = position_ids.astype("float32")
        if scaling.get("type") == "linear":
            positions = positions / scaling["factor"]
        elif scaling.get("type") == "dynamic":
            length = length.unsqueeze(-1) if paddle.is_tensor(length) else length
            over = paddle.clip(paddle.ones([1], "float64") * length / config.max_position_embeddings, min=1.0)
            base = base * (scaling["factor"] * over - (scaling["factor"] - 1)) ** (dim / (dim - 2))
        inverse = 1.0 / paddle.pow(base.astype("float32"), paddle.arange(0, dim, 2, dtype="float32") / dim)
        angles = (positions.unsqueeze(-1) * inverse).unsqueeze(2)
        cos, sin = _of_each(paddle.cos, angles), _of_each(paddle.sin, angles)
        self.cos, self.sin = paddle.concat([cos, cos], axis=-1), paddle.concat([-sin, sin], axis=-1)
        self._full = {}

    def apply(self, x):
        """x [rows, new, heads, head_dim] -> the same shape, rotated. Before attention, so that a key is never moved."""
        cos, sin = self._like(x)
        return x * cos + x.roll(x.shape[-1] // 2, axis=-1) * sin

    def _like(self, x):
        """Cosines and sines of x's shape: Paddle's broadcasting takes longer than all the rest of a small `apply`."""
        heads = x.shape[2]
        if heads not in self._full:
            self._full[heads] = tuple(
                t.astype(x.dtype).tile([x.shape[0] // t.shape[0], 1, heads, 1]) for t in (self.cos, self.sin)
            )
        return self._full[heads]


def _of_each(function, x):
    """`function` of each element. Paddle computes vectors of them on a CPU, in which one number can change another's
    last bit, and what is left over another way: so the last axis, of one token, is made of whole vectors."""
    size = x.shape[-1]
    empty = paddle.zeros([*x.shape[:-1], -size % VECTOR], x.dtype)
    return function(paddle.concat([x, empty], axis=-1))[..., :size] if size % VECTOR else function(x)


class Mask:
    """Which keys each of a pass's new tokens may see: those up to its own, and of them the allowed ones.

    Args:
        past: how many tokens were before: a number for all rows, or int64 [rows], on the device: then no shape and no
            Python number depends on it.
        new: how many tokens of each row are new.
        allowed: bool [rows, 1, 1 or new, past + new], False at keys that nobody may see; None where there are none.
        slots: where in the cache the rows are: None for one after the other, a number for a single row, or, with `past`
            for each row, int64 [rows].
    """

    def __init__(self, past, new, allowed=None, slots=None):
        self.past, self.new, self.allowed, self.slots = past, new, allowed, slots
        self.by_row = paddle.is_tensor(past)
        self.is_first = not self.by_row and past == 0
        self.by_query = allowed is not None and allowed.shape[2] > 1
        self._full = self._rows = self._lengths = None

    @cached_property
    def padding(self):
        """bool [rows, past + new], where the mask is the same for every query; None where nothing is masked."""
        return None if self.allowed is None else self.allowed.flatten(1)

    @cached_property
    def places(self):
        """int64 [rows, new], where in its row each new token is."""
        return self.past.unsqueeze(-1) + paddle.arange(self.new)

    def lengths(self, rows):
        """int64 [rows], the tokens of each row in all; the same tensor for all layers."""
        if self._lengths is None:
            self._lengths = self.past + self.new if self.by_row else paddle.full([rows], self.past + self.new, "int64")
        return self._lengths

    @cached_property
    def row_slots(self):
        """int64 [rows] on a CPU, the slots of the rows; None where row i is slot i."""
        return self.slots if self.slots is None or self.by_row else paddle.full([1], self.slots, "int64")

    @cached_property
    def host_rows(self):
        """[(slot, past)] of the rows, as Python's numbers: on a CPU alone, since a card would be waited for."""
        past = self.past.tolist()
        return list(zip(range(len(past)) if self.slots is None else self.slots.tolist(), past, strict=True))

    def cache_rows(self, shape):
        """int64 [rows * kv_heads * new]: of a cache [slots, kv_heads, capacity, head_dim] seen as rows of head_dim
        numbers those that the new tokens take."""
        if self._rows is None:
            slots, kv_heads, capacity, _ = shape
            slots = paddle.arange(slots) if self.slots is None else self.slots
            heads = slots.unsqueeze(-1) * kv_heads + paddle.arange(kv_heads)  # [rows, kv_heads]
            self._rows = (heads.unsqueeze(-1) * capacity + self.places.unsqueeze(1)).flatten()
        return self._rows

    def apply(self, scores, start, stop):
        """Scores [rows, kv_heads, group * queries, length] of the new tokens from `start` to `stop` and the first
        `length` keys: very negative where a key may not be seen."""
        rows, kv_heads, queries, length = scores.shape
        if self.new > FEW_TOKENS or stop - start < self.new:
            by_query = scores.reshape([rows, kv_heads, -1, stop - start, length])
            return paddle.minimum(by_query, self._ceiling(start, stop, length).unsqueeze(2)).reshape(scores.shape)
        if self._full is None:  # every layer's is the same; of the scores' shape, since broadcasting is slow
            ceiling = self._ceiling(0, self.new, length)
            self._full = ceiling.tile([rows // ceiling.shape[0], kv_heads, queries // self.new, 1])
        return paddle.minimum(scores, self._full)

    def _ceiling(self, start, stop, length):
        """float32 [rows or 1, 1, queries, length]: what scores must not exceed, 1e30 where a key may be seen, else
        -1e30. (Finite: where a query sees nothing, it must not make NaN. Adding it would give gradients there.)"""
        places = self.places[:, start:stop] if self.by_row else (paddle.arange(start, stop) + self.past).unsqueeze(0)
        visible = (paddle.arange(length) <= places.unsqueeze(-1)).unsqueeze(1)
        if self.allowed is not None:
            allowed = self.allowed if self.allowed.shape[2] == 1 else self.allowed[:, :, start:stop]
            visible = paddle.logical_and(visible, allowed[..., :length])
        return (visible.astype("float32") - 0.5) * 2e30


def attend(query, key, value, mask, dropout=0.0):
    """Grouped-query attention.

    Args:
        query: [rows, new, heads, head_dim]
        key, value: [rows, kv_heads, length, head_dim], of the tokens before, the new ones, and unused capacity; where
            the mask has a `past` for each row, the whole cache, [slots, kv_heads, capacity, head_dim].
        mask: Mask.
        dropout: of the attention probabilities.

    Returns:
        [rows, new, heads * head_dim]
    """
    rows, new, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    if mask.is_first and mask.allowed is None and _has_flash_attention(query):
        key, value = key.transpose([0, 2, 1, 3]), value.transpose([0, 2, 1, 3])
        out, _ = flash_attention(query, key, value, dropout=dropout, causal=True, training=dropout > 0)
        return out.reshape([rows, new, heads * head_dim])

    if _has_causal_attention(query, key, value, mask):
        return causal_attention(query, key, value, dropout)
    if _has_cached_attention(query, key, value, mask, dropout):
        slots = mask.slots if mask.by_row else None
        return cached_attention(query, key, value, mask.lengths(rows), slots, mask.padding)
    if mask.by_row and mask.slots is not None:
        key, value = (x.index_select(mask.slots) for x in (key, value))

    # queries that share a key head stand side by side, so that a key is read once for all of them
    query = (query / math.sqrt(head_dim)).reshape([rows, new, kv_heads, heads // kv_heads, head_dim])
    query = query.transpose([0, 2, 3, 1, 4])
    out = []
    for start in range(0, new, QUERY_CHUNK):
        stop = min(start + QUERY_CHUNK, new)
        chunk = query[:, :, :, start:stop], key, value
        if not mask.by_row:  # later keys are nobody's in this chunk
            length = mask.past + stop
            chunk = chunk[0], key[:, :, :length], value[:, :, :length]
        out.append(_attend_chunk(*(x.astype(query.dtype) for x in chunk), mask, start, stop, dropout))
    out = out[0] if len(out) == 1 else paddle.concat(out, axis=3)
    return out.transpose([0, 3, 1, 2, 4]).reshape([rows, new, heads * head_dim])


def _has_causal_attention(query, key, value, mask):
    """Training on a CPU: the compiled operator gives a gradient, and takes whole rows without a mask."""
    if not query.place.is_cpu_place() or query.dtype != paddle.float32 or operators() is None:
        return False
    return mask.is_first and mask.allowed is None and wants_gradient(query, key, value)


def _has_cached_attention(query, key, value, mask, dropout):
    """A pass over rows of the cache on a CPU is computed token by token; elsewhere the compiled operator takes float32
    tokens. It knows padding, but no other mask, and gives no gradient."""
    if not query.place.is_cpu_place() or query.dtype != paddle.float32:
        return False
    if dropout or mask.by_query or wants_gradient(query, key, value):
        return False
    return mask.by_row or operators() is not None


def _attend_chunk(query, key, value, mask, start, stop, dropout):
    """query [rows, kv_heads, group, new, head_dim]; key, value [rows, kv_heads, length, head_dim]"""
    rows, kv_heads, group, new, head_dim = query.shape
    scores = paddle.matmul(query.reshape([rows, kv_heads, group * new, head_dim]), key, transpose_y=True)
    weights = F.softmax(mask.apply(scores.astype("float32"), start, stop), axis=-1)
    weights = F.dropout(weights, dropout, training=True) if dropout else weights
    out = paddle.matmul(weights.astype(value.dtype), value)
    return out.reshape([rows, kv_heads, group, new, head_dim])


def _has_flash_attention(query):
    """Flash attention 2 takes 16 bits, heads of at most 256, and a card of compute capability 8.0 or more."""
    if not query.place.is_gpu_place() or query.dtype not in (paddle.float16, paddle.bfloat16):
        return False
    return query.shape[-1] <= 256 and paddle.device.cuda.get_device_capability()[0] >= 8


def allowed_keys(attention_mask, batch, new, length):
    """Any attention mask as bool [batch, 1, 1 or new, length]; None where there is none.

    Two axes [batch, length]: 0 at padding. Four axes [batch or 1, 1, 1 or new, length]: False or 0 where a key may
    not be seen, or, of floats, what is added to the scores: 0 where it may be seen, very negative where not.
    """
    if attention_mask is None:
        return None
    shape, is_float = list(attention_mask.shape), attention_mask.is_floating_point()
    if shape == [batch, length]:
        if is_float and bool((attention_mask < 0).any()):
            raise InputError("an attention_mask of two axes must hold 1, and 0 at padding; this one holds negatives")
        return attention_mask.astype("bool").reshape([batch, 1, 1, length])
    if len(shape) != 4 or shape[0] not in (1, batch) or shape[1:] not in ([1, 1, length], [1, new, length]):
        raise InputError(
            f"attention_mask must be [batch, cached + new tokens] = [{batch}, {length}] or "
            f"[{batch}, 1, 1 or {new}, {length}], got {shape}"
        )
    allowed = attention_mask > -1.0 if is_float else attention_mask.astype("bool")
    return allowed.expand([batch, -1, -1, -1])


def count_positions(allowed, past, new, batch):
    """Positions of the new tokens after `past` others: their number among the keys that the last one may see, and 1 at
    padding. int64 [batch, new]"""
    columns = paddle.arange(past, past + new)
    if allowed is None:
        return columns.unsqueeze(0).expand([batch, -1])
    allowed = allowed[:, 0, -1]
    positions = allowed.astype("int64").cumsum(axis=-1) - 1
    return paddle.where(allowed, positions, paddle.ones_like(positions)).index_select(columns, axis=1)
