# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The keys and values of tokens that the model has read: slots, in each of which a row has its own length."""

import math

import numpy as np
import paddle

from paddlemix.machine import release_memory, require_memory

from .checkpoint import dtype_name
from .parallel import share

CACHE_BLOCK = 1024  # tokens that a cache grows by


def cache_bytes(config, tokens, dtype, ranks=None):
    """What the keys and values of so many tokens take where the model is of a dtype: all but float32 keep 16 bits.
    ranks: of the processes that share the key heads, parallel.TensorParallel."""
    itemsize, heads = 4 if dtype == "float32" else 2, share(config.num_key_value_heads, ranks)
    return 2 * config.num_hidden_layers * (heads.stop - heads.start) * config.head_dim * itemsize * tokens


class KVCache:
    """Keys and values of every layer, [slots, kv_heads, capacity, head_dim], written in place.

    A slot holds the tokens of one row, from its place 0 on: `lengths[slot]` of them, int64 [slots]. Shorten a row by
    setting its length. The capacity grows in blocks up to `max_length`; no key is moved when a row comes or goes.

    Args:
        config: Emu3Config.
        slots: how many rows it starts with; `take` adds more.
        max_length: how many tokens a row may have.
        dtype: "float32", "float16" or "bfloat16".
        ranks: of the processes that share the key heads, parallel.TensorParallel.

    Raises:
        InputError: there is not enough memory for all of its rows at their full length, here or in another process.
    """

    def __init__(self, config, slots, max_length, dtype="float32", ranks=None):
        self.lengths, self.taken, self.max_length = np.zeros(slots, np.int64), [False] * slots, max_length
        heads, self.ranks = share(config.num_key_value_heads, ranks), ranks
        self.config, self.shape = config, (heads.stop - heads.start, config.head_dim)
        self.dtype = dtype_name(dtype)
        self._require_memory(slots, max_length, 0)
        shape, layers = [slots, self.shape[0], min(max_length, CACHE_BLOCK), self.shape[1]], config.num_hidden_layers
        self.keys, self.values = ([paddle.zeros(shape, dtype=dtype) for _ in range(layers)] for _ in "kv")

    @property
    def slots(self):
        return len(self.lengths)

    @property
    def on_cpu(self):
        return self.keys[0].place.is_cpu_place()

    @property
    def capacity(self):
        """Tokens that a row has memory for."""
        return self.keys[0].shape[2]

    @property
    def length(self):
        """Tokens of every row, where all have the same number, as in PaddleNLP's `generate`."""
        return int(self.lengths[0])

    @length.setter
    def length(self, length):
        self.lengths[:] = length

    def take(self, count, max_length):
        """`count` free slots for rows of at most `max_length` tokens, made where there are too few: a list of int."""
        free = [i for i, taken in enumerate(self.taken) if not taken][:count]
        more = count - len(free)
        slots, max_length = self.slots + more, max(self.max_length, max_length)
        self._require_memory(slots, max_length, self.slots * self.capacity)
        if more:
            self._resize(slots, self.capacity)
            free += range(self.slots, slots)
            self.lengths = np.append(self.lengths, np.zeros(more, np.int64))
            self.taken += [False] * more
        self.max_length = max_length
        for slot in free:
            self.taken[slot], self.lengths[slot] = True, 0
        return free

    def free(self, slots):
        for slot in slots:
            self.taken[slot], self.lengths[slot] = False, 0

    def reserve(self, length):
        """Capacity for `length` tokens a row, and for the rest of the block that the last one is in."""
        if length > self.capacity:
            self._resize(self.slots, min(math.ceil(length / CACHE_BLOCK) * CACHE_BLOCK, self.max_length))

    def write(self, layer, key, value, mask):
        """Put keys and values [rows, kv_heads, new, head_dim] after those that are in the rows' slots; `mask` is the
        pass's attention.Mask, which knows the slots and how many tokens are in them."""
        for cached, new in ((self.keys[layer], key), (self.values[layer], value)):
            new = new.astype(cached.dtype)
            if mask.by_row and self.on_cpu:  # whose scatter knows no 16 bits
                for row, (slot, past) in enumerate(mask.host_rows):
                    cached[slot, :, past : past + mask.new] = new[row]
            elif mask.by_row:
                rows = [-1, self.shape[1]]
                cached.view(rows).scatter_(mask.cache_rows(cached.shape), new.reshape(rows))
            elif mask.slots is None:
                cached[:, :, mask.past : mask.past + mask.new] = new
            else:
                cached[mask.slots, :, mask.past : mask.past + mask.new] = new[0]

    def read(self, layer, mask):
        """(keys, values) that the pass attends to: the whole cache, or the slot of a prompt's only row."""
        both = self.keys[layer], self.values[layer]
        if mask.by_row or mask.slots is None:
            return both
        return tuple(x[mask.slots : mask.slots + 1] for x in both)

    def copy_row(self, source, target, length):
        """Let `target` hold the first `length` tokens of `source` too."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]
        self.lengths[target] = length

    def grown_to(self, length):
        """This cache if a row may have `length` tokens, else a copy whose rows may have twice as many or that many."""
        if length <= self.max_length:
            return self
        other = self.map(paddle.clone)
        other.max_length = max(length, 2 * self.max_length)
        return other

    def map(self, function):
        """A cache of the tensors that `function` makes of this one's; where they are views, of copies."""
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.keys, other.values = ([function(x).contiguous() for x in xs] for xs in (self.keys, self.values))
        slots = other.keys[0].shape[0]
        other.lengths, other.taken = np.full(slots, self.length), [False] * slots
        return other

    def _resize(self, slots, capacity):
        """All tensors of these sizes, or, where memory does not allow it, of those they had."""
        before = self.slots, self.capacity
        try:
            self._resize_each(slots, capacity)
        except BaseException:
            self._resize_each(*before)
            raise
        release_memory()  # the old tensors are too small for what comes

    def _resize_each(self, slots, capacity):
        for tensors in (self.keys, self.values):
            for i, x in enumerate(tensors):  # one by one: never the whole cache twice
                x = x[:slots, :, :capacity]
                if x.shape[0] < slots:
                    x = paddle.concat([x, paddle.zeros([slots - x.shape[0], *x.shape[1:]], x.dtype)])
                if x.shape[2] < capacity:
                    empty = paddle.zeros([*x.shape[:2], capacity - x.shape[2], x.shape[3]], x.dtype)
                    x = paddle.concat([x, empty], axis=2)
                tensors[i] = x.contiguous()

    def _require_memory(self, slots, max_length, held):
        """`held`: the tokens that memory was taken for before."""
        tokens = slots * max_length
        size = cache_bytes(self.config, tokens - held, self.dtype, self.ranks)
        require = self.ranks.require_memory if self.ranks else require_memory
        require(size, f"for the keys and values of {tokens} tokens")
