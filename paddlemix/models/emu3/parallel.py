# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Several processes for one model: what they tell each other, and which part of a weight each of them has."""

import functools
import operator
import os
import re
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing.connection import Client, Listener

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
        except (RuntimeError, OSError, EOFError) as error:  # what the backends raise, each its own
            reason = re.sub(r"^\W*/\S+\s*", "", " ".join(str(error).split()))[:80] or type(error).__name__
            text = f"one of the {self.count} processes has ended or cannot be reached ({reason}){self.advice}"
            raise RankLost(text) from None

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

    def together(self, work):
        """work() of every process, however long it takes in each: gloo waits for none longer than 30 seconds, so that
        they tell each other meanwhile that they are there. Returns when all are done.

        What one raises ends all: it raises it, the others RankLost.
        """
        if self.count == 1:
            return work()
        device, done, failed = paddle.get_device(), 0, 0

        def on_device():
            paddle.set_device(device)  # a card is chosen for each thread
            return work()

        with ThreadPoolExecutor(1, "emu3-together") as thread:
            working = thread.submit(on_device)
            while done < self.count:
                wait([working], timeout=0.2)
                fault = working.exception() if working.done() else None
                done, failed = self.sum_numbers(float(working.done()), float(fault is not None))
        if failed and not fault:
            raise RankLost(f"another of the {self.count} processes has failed: see what it printed{self.advice}")
        return working.result()


class TensorParallel(Ranks):
    """The processes that share one model.

    Parts of a pass go through the collectives, where none may be late by more than gloo's 30 seconds. All else goes
    through connections of its own to the first process, where one may be waited for as long as it lives.
    """

    def __init__(self, advice=""):
        super().__init__(advice)
        listener, address, key = None, None, None
        if self.rank == 0:
            key, host = secrets.token_bytes(32), os.environ["PADDLE_CURRENT_ENDPOINT"].rsplit(":", 1)[0]
            listener = Listener((host, 0), "AF_INET", self.count, authkey=key)
            address = listener.address
        values = [(address, key)]
        self._call(paddle.distributed.broadcast_object_list, values, src=0)
        (address, key), self.others = values[0], {}
        if self.rank == 0:
            for _ in range(1, self.count):
                other = listener.accept()
                self.others[other.recv()] = other
            listener.close()
        else:
            self.first = Client(address, authkey=key)
            self.first.send(self.rank)
        for connection in self.others.values() if self.rank == 0 else [self.first]:
            with socket.socket(fileno=os.dup(connection.fileno())) as own:
                own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small messages wait for nothing

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
        if self.rank:
            return self._call(self.first.recv)
        for other in self.others.values():
            self._call(other.send, value)
        return value

    def gather(self, value):
        if self.rank:
            self._call(self.first.send, value)
            return self.from_first()
        return self.from_first([value, *(self._call(self.others[rank].recv) for rank in range(1, self.count))])

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
