# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Several processes for one model: what they tell each other, and which part of a weight each of them has."""

import functools
import operator
import os
import re
from dataclasses import dataclass

import paddle

from paddlemix.machine import NotEnoughMemory, RankLost, require_memory
from paddlemix.utils import InputError


class Ranks:
    """The processes of `python -m paddle.distributed.launch`, or this one by itself.

    `rank` is the number of this one, `count` how many there are. Every process calls the same methods in the same
    order. RankLost where another one has ended; `advice` is then the end of its line.
    """

    def __init__(self, advice=""):
        self.count = int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
        self.rank = int(os.environ.get("PADDLE_TRAINER_ID", 0)) if self.count > 1 else 0
        self.advice = advice and f": {advice}"
        if self.count > 1 and not paddle.distributed.is_initialized():
            self._call(paddle.distributed.init_parallel_env)

    def _call(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except (RuntimeError, OSError) as error:  # what the backends raise, each its own
            reason = re.sub(r"^\W*/\S+\s*", "", " ".join(str(error).split()))[:80]
            text = f"one of the {self.count} processes has ended or cannot be reached ({reason}){self.advice}"
            raise RankLost(text) from None

    # --- of training

    def reduce(self, tensor, owner):
        """The sum of everyone's tensor, in the owner's; what the others' holds then is not defined."""
        if self.count > 1:
            self._call(paddle.distributed.reduce, tensor, dst=owner)

    def sum_numbers(self, *numbers):
        """The sum of each number over all processes, float64."""
        if self.count == 1:
            return numbers
        total = paddle.to_tensor(numbers, "float64")
        self._call(paddle.distributed.all_reduce, total)
        return tuple(total.tolist())

    def broadcast(self, tensor, owner):
        """The owner's numbers in everyone's tensor."""
        if self.count > 1:
            self._call(paddle.distributed.broadcast, tensor, src=owner)

    def gather(self, value):
        """A small Python value of each process, a list."""
        values = [value]
        if self.count > 1:
            values = []
            self._call(paddle.distributed.all_gather_object, values, value)
        return values

    def wait(self):
        """Until all are here."""
        self.sum_numbers(0.0)

    # --- of tensor parallel

    def sum(self, x):
        """The sum of everyone's tensor, in all of them: the same bits in each."""
        if self.count > 2 and x.place.is_cpu_place():
            # all_reduce adds in an order that depends on the place in x: a row's bits would depend on other rows
            return functools.reduce(operator.add, self.gather_tensors(x))
        self._call(paddle.distributed.all_reduce, x)
        return x

    def gather_tensors(self, x):
        """Everyone's tensor, all of one shape, a list."""
        parts = []
        self._call(paddle.distributed.all_gather, parts, x)
        return parts

    def from_first(self, value=None):
        """The first process's small Python value, in all."""
        values = [value]
        self._call(paddle.distributed.broadcast_object_list, values, src=0)
        return values[0]

    def require_memory(self, size, purpose):
        """NotEnoughMemory in all where one has less than its `size` bytes free."""
        fault = None
        try:
            require_memory(size, purpose)
        except NotEnoughMemory as error:
            fault = str(error)
        if faults := [text for text in self.gather(fault) if text]:
            raise NotEnoughMemory(faults[0])


@dataclass(frozen=True)
class Part:
    """A process's part of a tensor of `shape` in a checkpoint: some rows, one slice after the other, or some columns;
    None is all of them."""

    shape: list
    rows: tuple | None = None
    columns: slice | None = None


def share(count, ranks, unit=1):
    """The slice of `count` things that this process has: whole units, as many in each as can be, or a few fewer in the
    last ones. `ranks` None is one process.

    InputError: there is not a unit for each.
    """
    if ranks is None:
        return slice(0, count)
    units = -(-count // unit)
    if units < ranks.count:
        raise InputError(f"{count} cannot be divided among {ranks.count} processes: take {units} or fewer")
    start, stop = (min(count, -(-units * rank // ranks.count) * unit) for rank in (ranks.rank, ranks.rank + 1))
    return slice(start, stop)


def times(part, factor):
    """The slice of the numbers that a slice of things has, `factor` each."""
    return slice(part.start * factor, part.stop * factor)
