# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Attention: the cache, rotary positions, masks, and the one function that attends."""

import math

import paddle
import paddle.nn.functional as F
from paddle.nn.functional.flash_attention import flash_attention

from paddlemix.utils import InputError

from .checkpoint import require_memory

QUERY_CHUNK = 512  # queries a time of the plain attention: never a whole [length, length] matrix


class KVCache:
    """Keys and values of every layer, of fixed size, written in place. `length` tokens are in it."""

    def __init__(self, config, batch_size, max_length, dtype="float32"):
        shape = [batch_size, max_length, config.num_key_value_heads, config.head_dim]
        itemsize = paddle.empty([0], dtype=dtype).element_size()
        require_memory(
            2 * config.num_hidden_layers * math.prod(shape) * itemsize,
            f"for the keys and values of {batch_size * max_length} tokens",
        )
        self.keys = [paddle.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.values = [paddle.zeros(shape, dtype=dtype) for _ in range(config.num_hidden_layers)]
        self.length = 0

    @property
    def max_length(self):
        return self.keys[0].shape[1]

    def write(self, layer, key, value):
        """Append keys and values [batch, new, kv_heads, head_dim]; give all so far [batch, length + new, ...]."""
        end = self.length + key.shape[1]
        self.keys[layer][:, self.length : end] = key
        self.values[layer][:, self.length : end] = value
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    def with_room(self, length):
        """This cache if it holds `length` tokens in all, else a copy of twice its size or of that length."""
        if length <= self.max_length:
            return self
        more = max(length - self.max_length, self.max_length)
        return self.map(lambda x: paddle.concat([x, paddle.zeros([x.shape[0], more, *x.shape[2:]], x.dtype)], axis=1))

    def map(self, function):
        """A cache of the tensors that `function` makes of this one's."""
        other = object.__new__(KVCache)
        other.keys, other.values = [function(k) for k in self.keys], [function(v) for v in self.values]
        other.length = self.length
        return other


def rotary_cos_sin(config, position_ids, length):
    """Cosines and sines of the rotary positions (Su et al., arXiv 2104.09864), float32 [B, new, 1, head_dim].

    `length` tokens in all decide the base of the dynamic (NTK-aware) scaling.
    """
    base, dim = config.rope_theta, config.head_dim
    scaling = config.rope_scaling or {}
    positions = position_ids.astype("float32")
    if scaling.get("type") == "linear":
        positions = positions / scaling["factor"]
    elif scaling.get("type") == "dynamic" and length > config.max_position_embeddings:
        stretch = scaling["factor"] * length / config.max_position_embeddings - (scaling["factor"] - 1)
        base = base * stretch ** (dim / (dim - 2))
    inverse = 1.0 / paddle.pow(paddle.to_tensor(base, "float32"), paddle.arange(0, dim, 2, dtype="float32") / dim)
    angles = positions.unsqueeze(-1) * inverse
    angles = paddle.concat([angles, angles], axis=-1).unsqueeze(2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn pairs (i, i + head_dim / 2) of x [batch, new, heads, head_dim] by their angles."""
    first, second = x.chunk(2, axis=-1)
    return x * cos.astype(x.dtype) + paddle.concat([-second, first], axis=-1) * sin.astype(x.dtype)


def attend(query, key, value, allowed=None, dropout=0.0):
    """Causal grouped-query attention; the last query sees the last key.

    Args:
        query: [batch, new, heads, head_dim]
        key, value: [batch, length, kv_heads, head_dim], length >= new
        allowed: bool [batch, 1, 1 or new, length], False at keys that may not be seen; None where all may.
        dropout: of the attention probabilities.

    Returns:
        [batch, new, heads * head_dim]
    """
    batch, new, heads, head_dim = query.shape
    length, kv_heads = key.shape[1:3]
    if allowed is None and new in (1, length) and _has_flash_attention(query):
        out, _ = flash_attention(query, key, value, dropout=dropout, causal=new > 1, training=dropout > 0)
        return out.reshape([batch, new, heads * head_dim])

    # queries that share a key head stand side by side, so that a key is read once for all of them
    query = query.reshape([batch, new, kv_heads, heads // kv_heads, head_dim]).transpose([0, 2, 3, 1, 4])
    key, value = key.transpose([0, 2, 1, 3]), value.transpose([0, 2, 1, 3])
    out = []
    for start in range(0, new, QUERY_CHUNK):
        rows = slice(start, start + QUERY_CHUNK)
        chunk_allowed = allowed if allowed is None or allowed.shape[2] == 1 else allowed[:, :, rows]
        out.append(_attend_chunk(query[:, :, :, rows], key, value, length - new + start, chunk_allowed, dropout))
    out = out[0] if len(out) == 1 else paddle.concat(out, axis=3)
    return out.transpose([0, 3, 1, 2, 4]).reshape([batch, new, heads * head_dim])


def _attend_chunk(query, key, value, past, allowed, dropout):
    """query [batch, kv_heads, group, new, head_dim] at positions from `past` on, key and value [batch, kv_heads,
    length, head_dim]"""
    batch, kv_heads, group, new, head_dim = query.shape
    length = past + new  # later keys are nobody's in this chunk
    key, value = key[:, :, :length], value[:, :, :length]
    query = query.reshape([batch, kv_heads, group * new, head_dim]) / math.sqrt(head_dim)
    scores = paddle.matmul(query, key, transpose_y=True)
    scores = scores.astype("float32").reshape([batch, kv_heads, group, new, length])
    visible = _visible(new, length, None if allowed is None else allowed[..., :length])
    if visible is not None:  # a finite number: where a query sees nothing, it must not make NaN
        scores = paddle.where(visible, scores, -1e30)
    weights = F.dropout(F.softmax(scores, axis=-1), dropout, training=dropout > 0).astype(value.dtype)
    out = paddle.matmul(weights.reshape([batch, kv_heads, group * new, length]), value)
    return out.reshape([batch, kv_heads, group, new, head_dim])


def _visible(new, length, allowed):
    """Which keys the last `new` queries may see, bool [batch or 1, 1, 1, new, length]; None where all see all."""
    if new == 1 and allowed is None:
        return None
    visible = paddle.arange(length) <= paddle.arange(length - new, length).unsqueeze(-1)
    visible = visible.reshape([1, 1, 1, new, length])
    return visible if allowed is None else paddle.logical_and(visible, allowed.unsqueeze(1))


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


def count_positions(allowed, past, length, batch):
    """Positions of the new tokens: their number among the keys that the last one may see, and 1 at padding."""
    if allowed is None:
        return paddle.arange(past, length).unsqueeze(0).expand([batch, -1])
    allowed = allowed[:, 0, -1]
    positions = allowed.astype("int64").cumsum(axis=-1) - 1
    return paddle.where(allowed, positions, paddle.ones_like(positions))[:, past:]
