# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The processes that train together, and what they tell each other."""

import os
import re

import paddle

from paddlemix.utils import InputError

BUCKET = 1 << 24  # numbers that go in one message


class Ranks:
    """The processes of `python -m paddle.distributed.launch`, or this one by itself.

    `rank` is the number of this one, `count` how many there are. Every process calls the same methods in the same
    order. InputError where another one has ended.
    """

    def __init__(self):
        self.count = int(os.environ.get("PADDLE_TRAINERS_NUM", 1))
        self.rank = int(os.environ.get("PADDLE_TRAINER_ID", 0)) if self.count > 1 else 0
        if self.count > 1:
            self._call(paddle.distributed.init_parallel_env)

    def _call(self, function, *arguments, **options):
        try:
            return function(*arguments, **options)
        except (RuntimeError, OSError) as error:  # what the backends raise, each its own
            reason = re.sub(r"^\W*/\S+\s*", "", " ".join(str(error).split()))[:80]
            raise InputError(
                f"one of the {self.count} processes has ended or cannot be reached ({reason}): the same command goes "
                "on from the last checkpoint, with any number of processes"
            ) from None

    def sum(self, tensors):
        """Tensors of one dtype, each becomes the sum of all processes'; in place."""
        if self.count == 1 or not tensors:
            return
        start = 0
        while start < len(tensors):
            stop, size = start, 0
            while stop < len(tensors) and (stop == start or size + tensors[stop].size <= BUCKET):
                size += tensors[stop].size
                stop += 1
            flat = paddle.concat([tensor.flatten() for tensor in tensors[start:stop]])
            self._call(paddle.distributed.all_reduce, flat)
            parts = flat.split([tensor.size for tensor in tensors[start:stop]])
            for tensor, part in zip(tensors[start:stop], parts, strict=True):
                tensor.set_value(part.reshape(tensor.shape))
            start = stop

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
