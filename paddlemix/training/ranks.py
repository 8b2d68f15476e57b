# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The processes that train together, and what they tell each other."""

import os
import re

import paddle

from paddlemix.utils import InputError


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
