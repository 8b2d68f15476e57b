# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Tensor parallel: a batch of the first process, which the batches of the others follow call by call.

A sequence is sent once, when it joins. From then on every process runs the same passes, each with its part of the
weights, and picks the same tokens by itself: the logits are gathered, and the noise is a function of the request.
"""

import copy
import itertools
from dataclasses import replace

from paddlemix.machine import RankLost, peak_memory
from paddlemix.utils import InputError

from .decoding import Batch

_keys = itertools.count()


def make_batch(model, name=None, **options):
    """A Batch with its options; of a model that several processes share a SharedBatch, whose model has this name."""
    return SharedBatch(model, name, **options) if model.ranks else Batch(model, **options)


class SharedBatch:
    """A Batch in the first process. `join`, `leave`, `give_up` and `step` are done in all processes.

    Args:
        model: Emu3ForCausalLM with ranks.
        name: that the others know the model by.
        options: Batch's.

    Raises:
        RankLost: another process has ended, or a pass has failed in this one: it cannot be taken again.
    """

    def __init__(self, model, name=None, **options):
        self.ranks, self.key = model.ranks, next(_keys)
        self.numbers, self.new = {}, itertools.count()  # of each sequence that has joined
        self._tell("begin", (name, options))
        self.batch = Batch(model, **options)

    def __getattr__(self, name):
        return getattr(self.batch, name)

    def __bool__(self):
        return bool(self.batch)

    def _tell(self, verb, value=None):
        self.ranks.from_first((self.key, verb, value))

    def join(self, *sequences):
        numbers = {sequence: next(self.new) for sequence in sequences}
        self._tell("join", [(number, _plain(sequence)) for sequence, number in numbers.items()])
        self.batch.join(*sequences)
        self.numbers |= numbers

    def leave(self, sequence):
        if sequence in self.batch.slots:
            self._tell("leave", self.numbers[sequence])
            self.batch.leave(sequence)

    def give_up(self):
        self._tell("give_up")
        self.batch.give_up()

    def step(self):
        self._tell("step")
        try:
            gained = self.batch.step()
        except RankLost:
            raise
        except Exception as error:  # the others are somewhere in the pass
            reason = " ".join(str(error).split())[:200]
            raise RankLost(f"a pass failed in one of {self.ranks.count} processes, which ends all: {reason}") from error
        self.numbers = {sequence: n for sequence, n in self.numbers.items() if sequence in self.batch.slots}
        return gained


def end(model):
    """Let the other processes end; what each of them has read and used, a list of dicts."""
    model.ranks.from_first(None)
    return _used(model)


def follow(ranks, owners):
    """Do in another process what the first one's batches do, until it ends them.

    owners: of each name of a model what has it as `.model`, which may load it then.
    """
    batches, sequences, model = {}, {}, None
    while (message := ranks.from_first()) is not None:
        key, verb, value = message
        batch = batches.get(key)
        if verb == "begin":
            name, options = value
            model = owners[name].model
            batches = {k: b for k, b in batches.items() if b or b.model is not model}  # what is done is not kept
            batches[key] = Batch(model, **options)
        elif verb == "join":
            sequences |= {(key, number): sequence for number, sequence in value}
            try:
                batch.join(*(sequence for _, sequence in value))
            except RankLost:
                raise
            except InputError:  # the first process has the same one
                pass
        elif verb == "leave":
            batch.leave(sequences[key, value])
        else:
            getattr(batch, verb)()
        here = {sequence for batch in batches.values() for sequence in batch.slots}
        sequences = {number: sequence for number, sequence in sequences.items() if sequence in here}
    if model is not None:
        _used(model)


def _used(model):
    used = {"bytes_read": model.bytes_read, "peak_memory_mb": round(peak_memory() / 2**20, 1)}
    return [{"rank": rank, **values} for rank, values in enumerate(model.ranks.gather(used))]


def _plain(sequence):
    """A copy without what is this process's: the batch that it was in, and the tokenizer."""
    other = copy.copy(sequence)
    other.batch = None
    if hasattr(other, "grammar"):
        other.grammar = replace(other.grammar, encode_text=None)
    return other
