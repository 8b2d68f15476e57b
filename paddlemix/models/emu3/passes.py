# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One forward pass of decoding: from the ids that sequences read to those that they pick, without a wait for a card."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from paddlemix.machine import available_cores
from paddlemix.paddle_private import to_tensor

from .cuda_graph import Replayed


class Pass:
    """A forward pass of one shape: what changes from one to the next is in tensors of fixed shape and address.

    A CUDA graph of `run` is replayed at each position, until a sequence comes or goes or the cache grows. On a GPU all
    slots of the cache are its rows, so that no key is moved; on a CPU those of its sequences.

    Args:
        batch: Batch.
        shape: of each sequence (itself, how many ids it reads, how many it picks).
        new: the most ids that a sequence reads; rows that read fewer are filled up, and what is computed there is lost.
    """

    def __init__(self, batch, shape, new):
        self.model, self.cache, self.shape = batch.model, batch.cache, shape
        self.rows = [batch.slots[sequence] for sequence, _, _ in shape]  # of each sequence in the pass
        slots = [slot for row in self.rows for slot in row]
        self.slots = None
        if batch.on_cpu:
            self.slots, numbers = paddle.to_tensor(slots), iter(range(len(slots)))
            self.rows = [[next(numbers) for _ in row] for row in self.rows]
        self.row_slots = np.array(slots) if batch.on_cpu else np.arange(self.cache.slots)
        self.ids = paddle.zeros([len(self.row_slots), new], "int64")
        self.past = paddle.zeros([len(self.row_slots)], "int64")
        self.noise = [None] * len(shape)
        self.picked = None
        owners = np.zeros(len(self.row_slots), np.int64)  # of each row which sequence's it is
        for i, rows in enumerate(self.rows):
            owners[rows] = i
        self.owners = None if batch.on_cpu else upload(owners)
        # a pass of several processes has their collectives in it, which were never tried in a graph
        may_record = all(s.sampling.can_be_recorded(picked) for s, _, picked in shape) and not self.model.ranks
        self.replayed = Replayed(may_record)

    def __call__(self, ids, lengths, ahead=0):
        """One pass; nothing waits for it.

        ids: of each sequence those that it reads, or, on the device, the one that the pass before has picked for each.
        lengths: int64 [slots], how many tokens are in the cache. ahead: passes that the sequences do not know of yet.

        Returns what is picked, int64 [all], one sequence after the other, or None; in place for the next call.
        """
        if paddle.is_tensor(ids):
            self.ids.copy_(ids.index_select(self.owners).unsqueeze(-1), False)
        else:
            padded = np.zeros(self.ids.shape, np.int64)
            for rows, own in zip(self.rows, ids, strict=True):
                padded[rows, : len(own)] = own
            self.ids.copy_(upload(padded), False)
        self.past.copy_(upload(lengths[self.row_slots]), False)
        picking = [i for i, (_, _, picked) in enumerate(self.shape) if picked]
        draws = [functools.partial(self.shape[i][0].draws, ahead) for i in picking]
        for i, noise in zip(picking, at_once(draws), strict=True):
            if noise is not None:
                self.noise[i] = paddle.zeros(noise.shape) if self.noise[i] is None else self.noise[i]
                self.noise[i].copy_(upload(noise), False)
        self.replayed(self.run)
        at_once([functools.partial(sequence.look_ahead, ahead) for sequence, _, _ in self.shape])
        return self.picked

    def run(self):
        hidden = self.model.model.step(self.ids, self.past, self.slots, self.cache)
        picked = self._pick(hidden)
        if self.picked is None or picked is None:
            self.picked = picked
        else:  # where the first pass put it
            self.picked.copy_(picked, False)

    def _pick(self, hidden):
        """Hidden states [rows, new, hidden_size] -> ids; a part of the head is read once for all that need it."""
        logits = {}
        # sorted: of several processes each must take them in one order
        for head in sorted({sequence.head for sequence, _, count in self.shape if count}):
            wanted = [i for i, (sequence, _, count) in enumerate(self.shape) if count and sequence.head == head]
            states = []
            for i in wanted:
                _, read, count = self.shape[i]
                states += [hidden[row, read - count : read] for row in self.rows[i]]
            out = self.model.lm_head(paddle.concat(states), slice(*head)).astype("float32")
            for i in wanted:
                rows, count = len(self.rows[i]), self.shape[i][2]
                logits[i], out = out[: rows * count].reshape([rows, count, -1]), out[rows * count :]
        picked = [self.shape[i][0].pick(logits[i], self.noise[i]) for i in sorted(logits)]
        return paddle.concat(picked) if picked else None


@functools.cache
def _threads():
    return ThreadPoolExecutor(available_cores(), "emu3-noise")


os.register_at_fork(after_in_child=_threads.cache_clear)  # the threads stay with the parent


def at_once(functions):
    """What each function gives. They make noise, 3.5 ms for the released vocabulary, for which NumPy lets other threads
    run."""
    if len(functions) < 2:
        return [function() for function in functions]
    return list(_threads().map(lambda function: function(), functions))


def upload(array):
    """A tensor on the device. A card is not waited for: pinned memory is copied in its turn, and Paddle keeps it."""
    if paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
    return to_tensor(array)
