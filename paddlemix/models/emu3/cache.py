# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The keys and values of tokens that the model has read."""

import math

import paddle

from paddlemix.machine import require_memory

CACHE_BLOCK = 1024  # tokens that a cache grows by


class KVCache:
    """Keys and values of every layer, [batch, kv_heads, room, head_dim], written in place.

    `length` tokens are in it, of at most `max_length`. A step attends over all of the room: its shapes stay, and no
    key is moved. The room grows in blocks, so that few of its places are empty.
    """

    def __init__(self, config, batch_size, max_length, dtype="float32"):
        self.length, self.max_length = 0, max_length
        layers, kv_heads, head_dim = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        itemsize = paddle.empty([0], dtype=dtype).element_size()
        require_memory(
            2 * layers * batch_size * kv_heads * max_length * head_dim * itemsize,
            f"for the keys and values of {batch_size * max_length} tokens",
        )
        shape = [batch_size, kv_heads, min(max_length, CACHE_BLOCK), head_dim]
        self.keys, self.values = ([paddle.zeros(shape, dtype=dtype) for _ in range(layers)] for _ in "kv")

    @property
    def room(self):
        return self.keys[0].shape[2]

    def reserve(self, length):
        """Room for `length` tokens, and for the rest of the block that the last one is in."""
        more = min(math.ceil(length / CACHE_BLOCK) * CACHE_BLOCK, self.max_length) - self.room
        if length > self.room:
            for tensors in (self.keys, self.values):
                for i, x in enumerate(tensors):  # one by one: never the whole cache twice
                    empty = paddle.zeros([*x.shape[:2], more, x.shape[3]], x.dtype)
                    tensors[i] = paddle.concat([x, empty], axis=2)

    def write(self, layer, key, value):
        """Put keys and values [batch, kv_heads, new, head_dim] after those that are in it."""
        end = self.length + key.shape[2]
        dtype = self.keys[layer].dtype
        self.keys[layer][:, :, self.length : end] = key.astype(dtype)
        self.values[layer][:, :, self.length : end] = value.astype(dtype)

    def with_room(self, length):
        """This cache if it takes `length` tokens in all, else a copy that takes twice its own or that many."""
        if length <= self.max_length:
            return self
        other = self.map(paddle.clone)
        other.max_length = max(length, 2 * self.max_length)
        return other

    def map(self, function):
        """A cache of the tensors that `function` makes of this one's; where they are views, of copies."""
        other = object.__new__(KVCache)
        other.keys, other.values = ([function(x).contiguous() for x in xs] for xs in (self.keys, self.values))
        other.length, other.max_length = self.length, self.max_length
        return other


class CacheAt:
    """A KVCache whose next tokens go to `positions`, int64 [new] on the device; its `length` is not read."""

    def __init__(self, cache, positions):
        self.keys, self.values = cache.keys, cache.values
        batch, kv_heads, room, self.head_dim = self.keys[0].shape
        self.rows = (paddle.arange(0, batch * kv_heads * room, room).unsqueeze(-1) + positions).flatten()

    def write(self, layer, key, value):
        """Put keys and values [batch, kv_heads, new, head_dim] there."""
        for cached, new in ((self.keys[layer], key), (self.values[layer], value)):
            rows = [-1, self.head_dim]
            cached.view(rows).scatter_(self.rows, new.astype(cached.dtype).reshape(rows))
