# Licensed under the Apache License, Version 2.0; see LICENSE.
"""One forward pass of decoding: from the ids that sequences read to those that they pick, without a wait for a card."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import paddle

from paddlemix.external_ops.pick_token import accept_tokens
from paddlemix.machine import available_cores
from paddlemix.paddle_private import to_tensor

from .cuda_graph import Replayed


class Pass:
    """A forward pass of one shape: what changes from one to the next is in tensors of fixed shape and address.

    A CUDA graph of `run` is replayed at each position, until a sequence comes or goes or the cache grows. Its rows are
    the slots of its sequences; on a GPU, where these are all slots of the cache, in the cache's order.

    Args:
        batch: Batch.
        shape: of each sequence (itself, how many ids it reads, how many it picks).
        new: the most ids that a sequence reads; rows that read fewer are filled up, and what is computed there is lost.
    """

    def __init__(self, batch, shape, new):
        self.model, self.cache, self.shape = batch.model, batch.cache, shape
        self.rows = [batch.slots[sequence] for sequence, _, _ in shape]  # of each sequence in the pass
        slots = [slot for row in self.rows for slot in row]
        self.slots, self.row_slots = None, np.arange(self.cache.slots)
        if batch.on_cpu or len(slots) < self.cache.slots:
            self.slots, self.row_slots, numbers = upload(np.array(slots)), np.array(slots), iter(range(len(slots)))
            self.rows = [[next(numbers) for _ in row] for row in self.rows]
        self.ids = paddle.zeros([len(self.row_slots), new], "int64")
        self.past = paddle.zeros([len(self.row_slots)], "int64")
        self.results = None
        self.noise = [batch.noise[sequence].rows for sequence, _, _ in shape]
        picks = [
            (rows[0], read - picked - (len(sequence.prompts[0]) - 1) + i, 1 if noise is None else noise.shape[0])
            for (sequence, read, picked), rows, noise in zip(shape, self.rows, self.noise, strict=True)
            for i in range(picked)
        ]
        self.first, self.shift, self.size = map(upload, np.array(picks, np.int64).reshape([-1, 3]).T.copy())
        self.forced = self.table = None
        counts = {picked for _, _, picked in shape}
        if not batch.on_cpu and len(counts) == 1 and all(sequence.forced is not None for sequence, _, _ in shape):
            self._follow_up(*counts)
        # a pass of several processes has their collectives in it, which were never tried in a graph
        self.replayed = Replayed(may_record=not self.model.ranks)

    def _follow_up(self, picks):
        """Let the pass make what one after it reads: arguments of accept_tokens."""
        places = max(len(sequence.forced) for sequence, _, _ in self.shape)
        forced = [np.pad(s.forced, (0, places - len(s.forced)), "edge") for s, _, _ in self.shape]
        table = np.zeros([len(self.row_slots), 4], np.int64)
        for i, ((sequence, read, _), rows) in enumerate(zip(self.shape, self.rows, strict=True)):
            for row, prompt in zip(rows, sequence.prompts, strict=True):
                before = len(prompt) - 1
                table[row] = i, before, before + len(sequence.forced) - 1, read - picks
        self.forced, self.table = upload(np.stack(forced)), upload(table)

    def feed(self, ids, lengths):
        """What the next call reads; nothing waits for it.

        ids: of each sequence int64 [read]. lengths: int64 [slots], how many tokens are in the cache.
        """
        padded = np.zeros(self.ids.shape, np.int64)
        for rows, own in zip(self.rows, ids, strict=True):
            padded[rows, : len(own)] = own
        self.ids.copy_(upload(padded), False)
        self.past.copy_(upload(lengths[self.row_slots]), False)

    def follow(self, other):
        """The next call reads what another pass, or this one, has made for it."""
        self.ids.copy_(other.results[1], False)
        self.past.copy_(other.results[2], False)

    def __call__(self):
        """One pass; nothing waits for it. Returns what is picked, int64 [all], one sequence after the other, or None.
        The next call has it in the same place."""
        self.replayed(self.run)
        return self.results[0] if self.results else None

    def run(self):
        results = self.compute()
        if self.results is None:
            self.results = results
        else:  # where the first pass put them
            for old, new in zip(self.results, results, strict=True):
                old.copy_(new, False)

    def compute(self):
        """What is picked, and what a pass after this one reads: ids and past."""
        picked = self._pick(self.model.model.step(self.ids, self.past, self.slots, self.cache))
        if picked is None or self.table is None:
            return () if picked is None else (picked,)
        windows = picked.reshape([len(self.shape), -1])
        return picked, *accept_tokens(self.ids, self.past, windows, self.forced, self.table)

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
        picked, start, places = [], 0, None
        if any(noise is not None for noise in self.noise):
            places = (self.past.index_select(self.first) + self.shift) % self.size
        for i in sorted(logits):
            sequence, _, count = self.shape[i]
            noise = self.noise[i]
            noise = None if noise is None else noise.index_select(places[start : start + count])
            picked.append(sequence.pick(logits[i], noise))
            start += count
        return paddle.concat(picked) if picked else None


class DeviceNoise:
    """The noise of a sequence's next positions on the device, that of position p in row p % count: several passes find
    theirs without the host, which uploads what is new for all of them at once.

    Args:
        sequence: Drawing or Answer.
        count: how many positions there is memory for.
    """

    def __init__(self, sequence, count):
        self.noise, self.count, self.end, self.stop = sequence.noise, count, sequence.draws, 0
        self.rows = None if sequence.sampling.is_greedy else paddle.zeros([count, self.noise.size])

    def missing(self, start, stop):
        """As sampling.Noise, without what is on the device; the sequence ends before some positions."""
        return self.noise.missing(max(start, self.stop), min(stop, self.end))

    def fill(self, start, stop):
        """Have the noise of these positions, in place of earlier ones; nothing waits for it."""
        start, stop = max(start, self.stop), min(stop, self.end)
        if self.rows is not None and start < stop:
            self.rows.scatter_(upload(np.arange(start, stop) % self.count), upload(self.noise(start, stop)))
            self.stop = stop


@functools.cache
def _threads():
    return ThreadPoolExecutor(available_cores(), "emu3-noise")


os.register_at_fork(after_in_child=_threads.cache_clear)  # the threads stay with the parent


def at_once(functions):
    """Call functions that make noise, 3.5 ms for the released vocabulary, for which NumPy lets other threads run."""
    if len(functions) < 2:
        return [function() for function in functions]
    return list(_threads().map(lambda function: function(), functions))


def upload(array):
    """A tensor on the device. A card is not waited for: pinned memory is copied in its turn, and Paddle keeps it."""
    if paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
    return to_tensor(array)
