# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Decoding step by step: the batch, which runs the model for all its sequences.

It owns the cache and is the only caller of the model. Sequences (sequences.py) join it and leave it between two passes,
and none changes another's tokens.
"""

import math
from collections import deque

import numpy as np
import paddle

from paddlemix.external_ops import operators
from paddlemix.external_ops.few_rows_linear import FEW_ROWS, few_rows
from paddlemix.machine import with_memory_released
from paddlemix.utils import InputError, whole_number, whole_numbers

DECODING = ("auto", "step", "jacobi")
WINDOW = 15  # tokens that a pass of "jacobi" guesses: twice as many save a tenth of the passes more
# Rows of a product on a CPU that take at most about a quarter longer than two, by dtype of the weights; without the
# compiled operators two take as long as one and four twice as long.
CHEAP_ROWS = {"float32": 6, "bfloat16": 6, "int8": 4, "int4": 2}
PROMPT_CHUNK = {"cpu": 512, "gpu": 4096}  # tokens of a prompt that are read at once, between the others' steps


class Batch:
    """Sequences that are decoded together, one token or more of each in a forward pass.

    On a CPU with the compiled operators a sequence's tokens are the same bits alone, beside others, joined late, with
    windows of guesses or without, and after it was cut off and went on: its prompt is read by itself in parts of fixed
    length, its drawn tokens by kernels whose row depends on nothing but its own tokens.

    Args:
        model: Emu3ForCausalLM.
        decoding: "step" draws a token a pass. "jacobi" (Teng et al., arXiv 2410.01699) gives each pass guesses of the
            `window` next tokens as well, and keeps those that prove to be the ones drawn: the same picture in fewer,
            larger passes. "auto" chooses the faster one for the device and the number of rows.
        window: of "jacobi"; None for a good one.
    """

    def __init__(self, model, decoding="auto", window=None):
        if decoding not in DECODING:
            raise InputError(f"decoding must be one of {', '.join(DECODING)}, got {decoding!r}")
        window = None if window is None else whole_number("window", window, "1 or more, a whole number", 1)
        if model.training:
            raise InputError("the model is in training, where dropout would change what is drawn: call model.eval()")
        self.model, self.decoding, self.window = model, decoding, window
        self.on_cpu = is_on_cpu(model)
        self.most = few_rows() if self.on_cpu else FEW_ROWS  # tokens of a pass that do not depend on each other
        self.cache, self.slots = None, {}  # of each sequence the slots of its rows
        self.waiting, self.running = deque(), []  # groups that joined together; sequences whose prompts are read
        self.forward_passes = 0  # that drew tokens
        self._passes = {}

    def __bool__(self):
        return bool(self.waiting or self.running)

    def join(self, *sequences):
        """Let sequences take part from the next step on: those that join together start together.

        One that was in a batch before goes on here: what it has drawn is read again, and the other batch lets it go.

        Raises:
            InputError: a sequence is in this batch already, its ids are not of this model, or the cache does not fit
                into memory with it. Then none of them joins.
        """
        sequences = [sequence for sequence in sequences if not sequence.is_done]
        if not sequences:
            return
        if len({*sequences, *self.slots}) < len(sequences) + len(self.slots):
            raise InputError("a sequence joins a batch once: it is there already")
        rows = [row for sequence in sequences for row in sequence.prompts]
        for row in rows:
            whole_numbers("a prompt's ids", row, 0, self.model.config.vocab_size - 1)
        length = max(sequence.length for sequence in sequences) + self.most  # a row may be filled up to another's new
        if self.cache is None:
            self.cache = with_memory_released(self.model.make_cache, len(rows), length)
        slots = iter(with_memory_released(self.cache.take, len(rows), length))
        for sequence in sequences:
            self.slots[sequence] = [next(slots) for _ in sequence.prompts]
            sequence.batch, sequence.cached = self, 0
        self.waiting.append(sequences)
        self._passes.clear()

    def leave(self, sequence):
        """Let a sequence go, done or not; its slots are others' to take. One that is not here is let go already."""
        if sequence not in self.slots:
            return
        self.running = [other for other in self.running if other is not sequence]
        for group in self.waiting:
            group[:] = [other for other in group if other is not sequence]
        self.cache.free(self.slots.pop(sequence))
        if sequence.batch is self:  # a finished sequence that is kept does not keep the cache
            sequence.batch = None
        self._passes.clear()

    @paddle.no_grad()
    def step(self):
        """Read a part of the prompts that wait, and run one pass for all whose prompts are read.

        Returns a list of (sequence, how many tokens it gained); those that are done have left. After an error or Ctrl-C
        in it the next step goes on as if nothing had been.
        """
        return with_memory_released(self._step)

    def _step(self):
        self._settle()
        self._read_prompts()
        gained = []
        for group in self._groups():
            gained += self._run(group)
            for sequence in group:
                if sequence.is_done:
                    self.leave(sequence)
        return gained

    def _settle(self):
        """Bring in order what is here and what is in the cache, however far the step before has come."""
        waiting = {sequence for group in self.waiting for sequence in group}
        for sequence in list(self.slots):
            here = sequence in waiting or sequence in self.running
            if sequence.is_done or sequence.batch is not self or not here:
                self.leave(sequence)
        self.running = [s for s in dict.fromkeys(self.running) if s in self.slots and s not in waiting]
        for sequence in self.running:
            for prompt, slot in zip(sequence.prompts, self.slots[sequence], strict=True):
                self.cache.lengths[slot] = len(prompt) - 1 + sequence.cached

    def _read_prompts(self):
        """Every row by itself, but for its last token, which the first step reads."""
        budget = chunk = PROMPT_CHUNK["cpu" if self.on_cpu else "gpu"]
        while self.waiting and budget > 0:
            row = next(self._unread(self.waiting[0]), None)
            if row is None:
                self.running = [*self.running, *self.waiting[0]]
                self.waiting.popleft()
                continue
            prompt, slot = row
            past = int(self.cache.lengths[slot])
            if past == 0 and (twin := self._read_before(prompt)) is not None:
                self.cache.copy_row(twin, slot, len(prompt) - 1)
                continue
            new = min(chunk, len(prompt) - 1 - past)
            self._reserve(past + new)
            ids = paddle.to_tensor([prompt[past : past + new]])
            self.model.model.read_prompt(ids, past, len(prompt), slot, self.cache)
            self.cache.lengths[slot] += new
            budget -= new

    def _unread(self, group):
        for sequence in group:
            for prompt, slot in zip(sequence.prompts, self.slots[sequence], strict=True):
                if self.cache.lengths[slot] < len(prompt) - 1:
                    yield prompt, slot

    def _read_before(self, prompt):
        """A slot that holds the same prompt already, as several pictures' of one request do; else None."""
        for sequence, slots in self.slots.items():
            for other, slot in zip(sequence.prompts, slots, strict=True):
                if other == prompt and self.cache.lengths[slot] >= len(prompt) - 1 > 0:
                    return slot
        return None

    def _groups(self):
        """The running sequences in groups of as many rows as one pass takes, each with a token and a row's end."""
        groups, rows = [], math.inf
        for sequence in self.running:
            rows += len(sequence.prompts)
            if 2 * rows > self.most and (self.on_cpu or not groups):
                groups.append([])
                rows = len(sequence.prompts)
            groups[-1].append(sequence)
        return groups

    def _run(self, group):
        """One pass. Returns what `step` returns, of these sequences."""
        rows = sum(len(sequence.prompts) for sequence in group)
        most = max(2, self.most // rows)
        window = min(choose_window(self.decoding, self.window, rows, self._cheap_rows()), most - 1)
        feeds = [sequence.feed(most, window) for sequence in group]
        new = max(len(ids) for ids, _ in feeds)
        self._reserve(int(self.cache.lengths.max()) + new)
        shape = tuple((sequence, len(ids), picked) for sequence, (ids, picked) in zip(group, feeds, strict=True))
        if shape not in self._passes:
            self._passes[shape] = Pass(self, shape, new)
        picked = self._passes[shape]([ids for ids, _ in feeds])
        self.forward_passes += any(count for _, _, count in shape)
        gained, start = [], 0
        for sequence, read, count in shape:
            gained.append((sequence, sequence.accept(read, picked[start : start + count])))
            start += count
        return gained

    def _reserve(self, length):
        if length > self.cache.capacity:
            self.cache.reserve(length)
            self._passes.clear()

    def _cheap_rows(self):
        """Rows that a pass takes at hardly more cost than one; None on a GPU, where a window is far from the limit."""
        if not self.on_cpu:
            return None
        return CHEAP_ROWS.get(self.model.weight_dtype, 2) if operators() else 2


def choose_window(decoding, window, rows, cheap_rows):
    """How many tokens a pass guesses; 0 is step by step."""
    if decoding == "step":
        return 0
    if decoding == "auto" and cheap_rows:
        return cheap_rows // rows if cheap_rows >= 2 * rows else 0
    return window or WINDOW


class Pass:
    """A forward pass of one shape: what changes from one to the next is in tensors of fixed shape and address.

    So a CUDA graph of `run` could be replayed at each position, until a sequence comes or goes or the cache grows. On a
    GPU all slots of the cache are its rows, so that no key is moved; on a CPU those of its sequences.

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

    def __call__(self, feeds):
        """feeds: the ids of each sequence -> what is picked, int64 [all], one sequence after the other"""
        ids = np.zeros(self.ids.shape, np.int64)
        for rows, feed in zip(self.rows, feeds, strict=True):
            ids[rows, : len(feed)] = feed
        self.ids.copy_(upload(ids), False)
        self.past.copy_(upload(self.cache.lengths[self.row_slots]), False)
        for i, (sequence, _, picked) in enumerate(self.shape):
            noise = sequence.draws() if picked else None
            if noise is not None:
                self.noise[i] = paddle.zeros(noise.shape) if self.noise[i] is None else self.noise[i]
                self.noise[i].copy_(upload(noise), False)
        self.run()
        for sequence, _, _ in self.shape:
            sequence.look_ahead()
        return [] if self.picked is None else self.picked.numpy()

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
        for head in {sequence.head for sequence, _, count in self.shape if count}:
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


def is_on_cpu(model):
    return model.lm_head.weight.place.is_cpu_place()


def upload(array):
    """A tensor on the device. A card is not waited for: pinned memory is copied in its turn, and Paddle keeps it."""
    if paddle.get_device().startswith("gpu"):
        return paddle.to_tensor(array, place=paddle.CUDAPinnedPlace()).cuda(blocking=False)
    return paddle.to_tensor(array)
