# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Decoding step by step: the batch, which runs the model for all its sequences.

It owns the cache and is the only caller of the model. Sequences (sequences.py) join it and leave it between two passes,
and none changes another's tokens.
"""

import math
from collections import deque

import paddle

from paddlemix.external_ops import operators
from paddlemix.external_ops.few_rows_linear import FEW_ROWS, few_rows
from paddlemix.machine import NotEnoughMemory, RankLost, require_memory, with_memory_released
from paddlemix.utils import InputError, whole_number, whole_numbers

from .cache import cache_bytes
from .passes import DeviceNoise, Pass, at_once
from .sequences import Answer
from .windows import COSTS, WITHOUT_OPERATORS, choose_window

DECODING = ("auto", "step", "jacobi")
MOST_PASSES = 8  # that are kept for their shapes to come again; a CUDA graph holds the memory of its pass
PROMPT_CHUNK = {"cpu": 512, "gpu": 4096}  # tokens of a prompt that are read at once, between the others' steps


class Batch:
    """Sequences that are decoded together, one token or more of each in a forward pass.

    On a CPU with the compiled operators a sequence's tokens are the same bits alone, beside others, joined late, with
    windows of guesses or without, and after it was cut off and went on: its prompt is read by itself in parts that its
    own tokens decide, its drawn tokens by kernels whose row depends on nothing but its own tokens.

    Args:
        model: Emu3ForCausalLM.
        decoding: "step" draws a token a pass. "jacobi" (Teng et al., arXiv 2410.01699) gives each pass guesses of the
            `window` next tokens as well, and keeps those that prove to be the ones drawn: the same picture in fewer,
            larger passes. "auto" guesses as many as pay for the device, the dtype, the number of rows, and this picture
            so far (windows.py).
        window: of "jacobi"; None for a good one.
        prefix_tokens: keep the prompts of answers that left in so many tokens of the cache, those that were used last:
            a prompt that begins as one of them, or as one that is here, reads only the rest: from the last chunk, or
            the last end of a picture, that the two have in common, so that the answer has the same bits.
    """

    def __init__(self, model, decoding="auto", window=None, prefix_tokens=0):
        if decoding not in DECODING:
            raise InputError(f"decoding must be one of {', '.join(DECODING)}, got {decoding!r}")
        window = None if window is None else whole_number("window", window, "1 or more, a whole number", 1)
        if model.training:
            raise InputError("the model is in training, where dropout would change what is drawn: call model.eval()")
        self.model, self.decoding, self.window, self.prefix_tokens = model, decoding, window, prefix_tokens
        self.on_cpu = is_on_cpu(model)
        self.chunk = PROMPT_CHUNK["cpu" if self.on_cpu else "gpu"]
        self.most = few_rows() if self.on_cpu else FEW_ROWS  # tokens of a pass that do not depend on each other
        self.cache, self.slots = None, {}  # of each sequence the slots of its rows
        self.noise = {}  # of each running sequence that on the device
        self.kept = {}  # of each slot that no sequence has the prompt in it, the one used last at the end
        self.waiting, self.running = deque(), []  # groups that joined together; sequences whose prompts are read
        self.forward_passes = 0  # that drew tokens
        self._passes = {}

    def __bool__(self):
        return bool(self.waiting or self.running)

    @property
    def pass_rows(self):
        """Rows that one pass takes, each with a token and a row's end."""
        return self.most // 2

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
        slots = iter(self._take(len(rows), max(map(self._length, sequences))))
        for sequence in sequences:
            self.slots[sequence] = [next(slots) for _ in sequence.prompts]
            sequence.batch, sequence.cached, sequence.reused = self, 0, 0
        self.waiting.append(sequences)

    def _length(self, sequence):
        return sequence.length + self.most  # a row may be filled up to another's new

    def _take(self, count, length):
        """Free slots. Where memory is short, kept prompts are given up for them, and then a cache of nobody."""
        self._forget_passes()
        while True:
            try:
                if self.cache is None:
                    self.cache = self._with_memory(self.model.make_cache, count, length)
                return self._with_memory(self.cache.take, count, length)
            except (NotEnoughMemory, MemoryError):
                if self.kept:
                    self._give_up_oldest()
                elif self.slots or self.cache is None:
                    raise
                else:
                    self.cache = None

    def _with_memory(self, function, *arguments):
        """machine.with_memory_released; but one of several processes must not begin anything again by itself."""
        if self.model.ranks is None:
            return with_memory_released(function, *arguments)
        try:
            return function(*arguments)
        except MemoryError as error:
            raise RankLost(f"process {self.model.ranks.rank} is out of memory, which ends all") from error

    def require_memory(self, tokens):
        """InputError where a sequence of so many tokens, in all its rows, cannot join, even when the others left."""
        dtype = "float32" if self.model.dtype == paddle.float32 else "bfloat16"
        held = self.cache.slots * self.cache.capacity if self.cache else 0
        size = cache_bytes(self.model.config, tokens - held, dtype, self.model.ranks)
        try:
            require_memory(size, f"for the keys and values of {tokens} tokens")
        except NotEnoughMemory as error:  # to wait would not help
            raise InputError(str(error)) from None

    def give_up(self):
        """Give up the prompts that are kept, and the cache where no sequence has a slot in it."""
        while self.kept:
            self._give_up_oldest()
        if not self.slots:
            self.cache = None
            self._forget_passes()

    def _give_up_oldest(self):
        slot = next(iter(self.kept))
        del self.kept[slot]
        self.cache.free([slot])

    def leave(self, sequence):
        """Let a sequence go, done or not; its slots are others' to take. One that is not here is let go already."""
        if sequence not in self.slots:
            return
        self.running = [other for other in self.running if other is not sequence]
        for group in self.waiting:
            group[:] = [other for other in group if other is not sequence]
        slots = self.slots.pop(sequence)
        self.noise.pop(sequence, None)
        if not (isinstance(sequence, Answer) and self._keep(sequence.prompts[0], slots[0])):
            self.cache.free(slots)
        if sequence.batch is self:  # a finished sequence that is kept does not keep the cache, nor noise
            sequence.batch = None
            sequence.noise.forget()
        self._forget_passes()

    def _keep(self, prompt, slot):
        """Keep a prompt that was read, where it has parts that no kept one has; whether it is kept."""
        mine, was_read = self._whole(prompt), self.cache.lengths[slot] >= len(prompt) - 1
        if not mine or not was_read or self.cache.capacity > self.prefix_tokens:
            return False
        for other, kept in list(self.kept.items()):
            theirs = self._whole(kept)
            if mine[: len(theirs)] == theirs:
                del self.kept[other]
                self.cache.free([other])
            elif theirs[: len(mine)] == mine:
                return False
        self.kept[slot], self.cache.lengths[slot] = prompt, len(prompt) - 1
        self._bound_kept()
        return True

    def _whole(self, prompt):
        """What a prompt has in front of its last part, which few others share."""
        start = 0
        while (end := start + len(self._part(prompt, start))) < len(prompt) - 1:
            start = end
        return prompt[:start]

    def _part(self, prompt, start):
        """What of a prompt is read at once from `start` on: a chunk, or up to the end of a picture, so that questions
        about it have its parts in common. Its last token is of no part: the first step reads it."""
        part = prompt[start : min(start + self.chunk, len(prompt) - 1)]
        end = self.model.config.eoi_token_id
        return part[: part.index(end) + 1] if end in part else part

    def _bound_kept(self):
        """A slot takes the cache's capacity, however few tokens are in it."""
        while len(self.kept) * self.cache.capacity > self.prefix_tokens:
            self._give_up_oldest()

    @paddle.no_grad()
    def step(self, only=None):
        """Read a part of the prompts that wait, and run one pass for all whose prompts are read. On a card, where only
        pictures are drawn and nothing else waits, several: token by token to the end of a row, with windows of guesses
        Drawing.passes_ahead.

        `only`: of these sequences; the others stay as they are. None is all.

        Returns a list of (sequence, how many tokens it gained); those that are done have left. After an error or Ctrl-C
        in it the next step goes on as if nothing had been.
        """
        return self._with_memory(self._try_step, only)

    def _try_step(self, only):
        try:
            return self._step(only)
        except MemoryError:  # what CUDA graphs hold is not among what Paddle can release
            self._forget_passes()
            raise

    def _step(self, only):
        self._settle()
        only = set(self.slots if only is None else only)
        self._read_prompts(only)
        gained = []
        for group in self._groups(only):
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

    def _read_prompts(self, only):
        """Every row by itself, but for its last token, which the first step reads."""
        budget = self.chunk
        for group in [group for group in self.waiting if only.issuperset(group)]:
            for sequence in group:
                for prompt, slot in zip(sequence.prompts, self.slots[sequence], strict=True):
                    while (past := int(self.cache.lengths[slot])) < len(prompt) - 1:
                        if past == 0 and (found := self._read_before(prompt)) is not None:
                            self.cache.copy_row(found[1], slot, found[0])
                            sequence.reused += found[0]
                            continue
                        if budget <= 0:
                            return
                        part = self._part(prompt, past)
                        self._reserve(past + len(part))
                        self.model.model.read_prompt(paddle.to_tensor([part]), past, len(prompt), slot, self.cache)
                        self.cache.lengths[slot] += len(part)
                        budget -= len(part)
            self.running = [*self.running, *group]
            self.waiting.remove(group)

    def _read_before(self, prompt):
        """(how many tokens, the slot that holds them) of another row that begins as this prompt; None where none does.

        Whole parts: what was read in other pieces has other bits. The bases of dynamic positions are those of a whole
        prompt, of its length.
        """
        rows = [(slot, row) for s, slots in self.slots.items() for slot, row in zip(slots, s.prompts, strict=True)]
        best, is_dynamic = (0, None), (self.model.config.rope_scaling or {}).get("type") == "dynamic"
        for slot, row in [*self.kept.items(), *rows]:
            same = 0
            while (part := self._part(prompt, same)) and part == self._part(row, same):
                if same + len(part) > self.cache.lengths[slot] or (is_dynamic and len(row) != len(prompt)):
                    break
                same += len(part)
            best = max(best, (same, slot), key=lambda found: found[0])
        if best[1] in self.kept:  # it is the one used last
            self.kept[best[1]] = self.kept.pop(best[1])
        return best if best[0] else None

    def _groups(self, only):
        """The running sequences in groups of as many rows as one pass takes, each with a token and a row's end."""
        groups, rows = [], math.inf
        for sequence in filter(only.__contains__, self.running):
            rows += len(sequence.prompts)
            if 2 * rows > self.most and (self.on_cpu or not groups):
                groups.append([])
                rows = len(sequence.prompts)
            groups[-1].append(sequence)
        return groups

    def _run(self, group):
        """One pass, or several that the host need not look into. Returns what `step` returns, of these sequences."""
        rows = sum(len(sequence.prompts) for sequence in group)
        most = max(2, self.most // rows)
        window = min(self._window(group, rows), most - 1)
        feeds = [sequence.feed(most, window, not self.on_cpu) for sequence in group]
        new, rows = max(len(ids) for ids, _ in feeds), [slot for sequence in group for slot in self.slots[sequence]]
        shape = tuple((sequence, len(ids), picked) for sequence, (ids, picked) in zip(group, feeds, strict=True))
        passes, lengths = self._passes_at_once(shape, window), self.cache.lengths
        shapes = [shape] + [tuple((sequence, 1 + window, 1 + window) for sequence in group)] * (passes - 1)
        end = int(lengths[rows].max()) + (passes - 1) * (1 + window)
        end = min(end, max(sequence.length for sequence in group))  # where a row stays
        self._reserve(max(end, int(lengths[rows].max())) + new)
        noise = [self._noise(*each, passes) for each in shape]
        at_once([make for each, start, stop in noise for make in each.missing(start, stop)])
        for each, start, stop in noise:
            each.fill(start, stop)
        last, picked = None, []
        for shape in shapes:
            # used last: at the end
            this = self._passes.pop(shape, None) or Pass(self, shape, max(read for _, read, _ in shape))
            self._passes[shape] = this
            self._forget_passes(MOST_PASSES)
            if last is None:
                this.feed([ids for ids, _ in feeds], lengths)
            else:
                this.follow(last)
            last, ids = this, this()
            picked.append(ids if passes == 1 else ids.clone())  # another replay puts its own in that place
        # while the device computes, that of as many passes more
        at_once([make for each, start, stop in noise for make in each.missing(start, 2 * stop - start)])
        return self._accept(shapes, picked)

    def _passes_at_once(self, shape, window):
        """Passes that run one after the other without the host, on a card. On a CPU there is nothing to wait for."""
        if self.on_cpu or self.waiting or any(picked != 1 + window for _, _, picked in shape):
            return 1
        return min(sequence.passes(window) for sequence, _, _ in shape)

    def _noise(self, sequence, read, picked, passes):
        """A sequence's noise on the device, and the positions, start and stop, that so many passes may pick."""
        count = max(picked, 1 if self.on_cpu else sequence.ahead)
        if sequence not in self.noise or self.noise[sequence].count < count:
            self._forget_passes()
            self.noise[sequence] = DeviceNoise(sequence, count)
        start = sequence.cached + read - picked
        return self.noise[sequence], start, start + passes * picked

    def _accept(self, shapes, picked):
        """Here the host waits for the device, once for all passes."""
        gained, start = {sequence: 0 for sequence, _, _ in shapes[0]}, 0
        picked = [] if picked[0] is None else (picked[0] if len(picked) == 1 else paddle.concat(picked)).numpy()
        for shape in shapes:
            self.forward_passes += any(count and not sequence.is_done for sequence, _, count in shape)
            for sequence, read, count in shape:
                gained[sequence] += sequence.accept(read, picked[start : start + count])
                start += count
        return list(gained.items())

    def _reserve(self, length):
        if length > self.cache.capacity:
            self._forget_passes()
            self.cache.reserve(length)
            self._bound_kept()

    def _forget_passes(self, most=0):
        """All but those used last: where rows or the cache change, the addresses in them are no longer right."""
        while len(self._passes) > most:
            self._passes.pop(next(iter(self._passes))).replayed.reset()

    def _window(self, group, rows):
        """How many tokens a pass of this group guesses. On a GPU a window is far from what a pass takes for nothing."""
        costs = COSTS.get(self.model.weight_dtype, WITHOUT_OPERATORS) if operators() else WITHOUT_OPERATORS
        luck = sum(sequence.luck for sequence in group) / len(group)
        return choose_window(self.decoding, self.window, rows, costs if self.on_cpu else None, luck)


def is_on_cpu(model):
    return model.lm_head.weight.place.is_cpu_place()
