# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Workers in several processes, on one machine or more, by Ray: an actor each, with a model of its own."""

import logging
import os
import re
import socket
import sys
import time
from collections import deque
from itertools import islice

from paddlemix.machine import available_cores
from paddlemix.utils import InputError, shown

NEEDED = '--ray needs Ray: pip install "ray[serve]==2.60.0"'
TURN_S = 1.0  # that an actor works before it gives what is finished
ROWS_BESIDE = 8  # that an actor has beside those that its worker has taken
MOST_AHEAD = 4096  # rows that are finished and wait for one before them to be written
MOST_DEATHS = 3  # of actors, before a row is finished


def connect(address=""):
    """Connect to Ray and return it.

    address: of a cluster, "auto" or HOST:PORT; "" starts one on this machine, which ends with this process.

    InputError: Ray is not installed, or cannot be started or reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of 15: beside any other program they would hardly run
    try:
        import ray
        from ray._private import services, utils, worker
    except ModuleNotFoundError:
        raise InputError(NEEDED) from None
    worker._worker_logs_enabled = False  # what its processes report would still come to stdout, between our lines
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address:
            found = services.canonicalize_bootstrap_address_or_die(address) if address == "auto" else address
            if not _answers(found):  # Ray itself would try for minutes
                raise InputError(f"no Ray cluster answers at {shown(found)}: give its head's address, HOST:PORT")
            ray.init(found, **quiet)
        else:  # whatever runs here already
            ray.init("local", num_cpus=own_resources()["CPU"], include_dashboard=False, **quiet)
    except InputError:
        raise
    except ConnectionError:
        raise InputError(
            "no Ray cluster answers, or it has another token: start one (ray start --head), set RAY_AUTH_MODE=token if "
            "it has one, or give --ray alone"
        ) from None
    except Exception as error:  # Ray raises bare ones too, where a node does not start in time
        raise InputError(f"Ray does not start or answer: {_line(error)}") from None
    utils.set_sigterm_handler(lambda *_: sys.exit(143))  # Ray's own writes a trace and aborts
    return ray


def own_resources():
    """Of a Ray that `connect` starts, as it names them: known before that, which takes seconds."""
    import paddle

    return {"CPU": max(2, available_cores()), "GPU": paddle.device.cuda.device_count()}


def _answers(address):
    """Whether somebody listens at HOST:PORT; of other forms of an address Ray knows by itself."""
    match = re.fullmatch(r"(?:ray://)?([^/:]+):(\d{1,5})", address)
    if not match:
        return True
    try:
        socket.create_connection((match[1], int(match[2])), timeout=5).close()
        return True
    except (OSError, OverflowError):
        return False


def _line(error):
    return " ".join(str(error).split())[:300]


class Actor:
    """A worker in a process of its own. `make`: a function that makes it, called there; folder: to work in."""

    def __init__(self, make, folder):
        os.chdir(folder)
        self.make, self.worker, self.rows = make, None, deque()

    def job(self):
        self.worker = self.make()
        return self.worker.job

    def turn(self, rows, is_last):
        """Work for a while, or until no row is left. Returns the finished ones, and how many more it takes."""
        if self.worker is None:
            self.job()
        self.rows.extend(rows)
        worker, finished, end = self.worker, [], time.monotonic() + TURN_S
        if not worker and not self.rows:
            time.sleep(0.05)  # others must finish first
        while time.monotonic() < end:
            while self.rows and worker.has_room:
                worker.add(*self.rows.popleft())
            if not worker or (worker.has_room and rows and not is_last):
                break  # for more rows, so that those of a kind come together
            finished += worker.step()
        return finished, max(0, ROWS_BESIDE + worker.has_room - len(self.rows))


class Actors:
    """`with Actors(make, count, address) as actors:` then `actors.job` is the workers' own, and `actors.run(rows)` as
    workers.run. An actor that dies is replaced, and its rows are begun again.

    Args:
        make: a function without arguments that makes a worker, called in each process.
        count: of actors; None is one a card, or one a machine without cards.
        address: as `connect` takes it.

    InputError: what `connect` raises, too few processors or cards, what `make` raises, or actors that die again and
    again.
    """

    def __init__(self, make, count=None, address=""):
        self.make, self.count, self.address = make, count, address
        self.held, self.turns = {}, {}  # of each actor the rows that it has; of each turn its actor

    def __enter__(self):
        if not self.address:
            self._find_count(own_resources(), 1)
        self.ray = connect(self.address)
        self._died = self.ray.exceptions.RayActorError, self.ray.exceptions.OutOfMemoryError
        try:
            self._start()
        except self._died as error:
            self.__exit__()
            raise InputError(f"a worker died while its model was loaded ({_line(error)})") from None
        except BaseException:
            self.__exit__()
            raise
        return self

    def _find_count(self, has, machines):
        """How many actors there will be. InputError where Ray would wait without a word."""
        import paddle

        on_card = paddle.get_device() != "cpu"
        free = int(has.get("GPU" if on_card else "CPU", 0))
        count = self.count or (free if on_card else machines)
        if count > free or not count:
            raise InputError(
                f"{max(1, count)} workers need a {'card' if on_card else 'processor'} each, Ray has {free} free: take "
                "fewer --workers, or wait for other jobs"
            )
        return count, on_card

    def _start(self):
        has = self.ray.available_resources()
        count, on_card = self._find_count(has, sum(node["Alive"] for node in self.ray.nodes()))
        threads = max(1, int(has.get("CPU", 1)) // count)
        self.actor = self.ray.remote(Actor).options(
            num_cpus=int(not on_card), num_gpus=int(on_card),
            scheduling_strategy="SPREAD",  # else Ray fills half of a machine before it takes the next
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        )  # fmt: skip
        actors = [self._new() for _ in range(count)]
        jobs = self._get([actor.job.remote() for actor in actors])
        other = next((job for job in jobs if job != jobs[0]), None)
        if other:
            raise InputError(f"the workers have different models: {shown(other)}, and {shown(jobs[0])}")
        self.job = jobs[0]
        for actor in actors:
            self._turn(actor, [], False)

    def _new(self):
        actor = self.actor.remote(self.make, os.getcwd())
        self.held[actor] = {}
        return actor

    def _turn(self, actor, rows, is_last):
        self.held[actor].update(rows)
        self.turns[actor.turn.remote(rows, is_last)] = actor

    def _get(self, what):
        """ray.get, with the errors as they were raised."""
        try:
            return self.ray.get(what)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None

    def run(self, numbered):
        """(number, values) of each of the numbered rows, in any order."""
        rows, again, is_last, newest, deaths = iter(numbered), deque(), False, -1, 0
        while self.turns:
            [ready], _ = self.ray.wait(list(self.turns))
            actor = self.turns.pop(ready)
            try:
                finished, wanted = self._get(ready)
            except self._died as error:
                again.extend(sorted(self.held.pop(actor).items()))
                deaths += 1
                if deaths == MOST_DEATHS:
                    raise InputError(f"workers die again and again ({_line(error)})") from None
                self._turn(self._new(), [], False)
                continue
            for number, values in finished:
                if self.held[actor].pop(number, None):
                    deaths = 0
                    yield number, values
            oldest = min((min(held) for held in self.held.values() if held), default=newest)
            more = [again.popleft() for _ in range(min(wanted, len(again)))]
            if not more and newest - oldest < MOST_AHEAD:
                more = list(islice(rows, wanted))
                is_last = is_last or len(more) < wanted
                newest = more[-1][0] if more else newest
            if more or self.held[actor] or not is_last:
                self._turn(actor, more, is_last and not again)

    def __exit__(self, *exception):
        self.ray.shutdown()
