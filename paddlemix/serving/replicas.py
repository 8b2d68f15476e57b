# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The service in several processes, on one machine or more, behind one address: Ray Serve spreads the requests."""

import contextlib
import os
import socket
import time

from paddlemix.jobs.actors import NEEDED, connect, own_resources
from paddlemix.utils import InputError

STARTED_S = 600  # for Ray's proxies to answer


class Replicas:
    """`with Replicas(...):` the requests to an address are served; at its end what runs is finished, for a while.

    Args:
        make_app: a function without arguments that makes an ASGI application, in each process.
        count: how many.
        host, port: where Ray's proxy listens, on each machine of the cluster.
        address: of a Ray cluster; "" starts one on this machine, which ends with this.
        drain_seconds: how long a process may take to finish what it has.

    Raises:
        InputError: Ray is not installed, cannot be reached, has too few processors or cards, or the port is taken.
    """

    def __init__(self, make_app, count, host, port, address="", drain_seconds=30):
        self.make_app, self.count, self.drain_seconds = make_app, count, drain_seconds
        self.host, self.port, self.address = host, port, address

    def __enter__(self):
        if not self.address:
            self._find_share(own_resources())
        os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")  # of 5, which a busy machine passes
        with self._hold():
            ray = connect(self.address)
            try:
                from ray import serve
            except ModuleNotFoundError:  # Ray alone
                raise InputError(NEEDED) from None
            try:
                self._run(ray, serve)
            except BaseException:
                self.__exit__()
                raise

    def _hold(self):
        """A socket that keeps others from the port until Ray's proxy listens there, which binds beside it."""
        held = socket.socket(socket.AF_INET6 if ":" in self.host else socket.AF_INET)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            if not self.address:  # a cluster may be another user's, who could not
                held.bind((self.host, self.port))
        except OSError:
            held.close()
            raise InputError(f"port {self.port} is not free yet: wait a minute, or give another --port") from None
        return held

    def _find_share(self, has):
        """The processors of a replica, and whether it has a card. InputError where there are too few."""
        import paddle

        on_card = paddle.get_device() != "cpu"
        share = 1 if on_card else has.get("CPU", 0) / self.count
        if share < 0.5 or on_card and has.get("GPU", 0) < self.count:
            raise InputError(
                f"{self.count} replicas need {'a card' if on_card else 'half a processor'} each, Ray has "
                f"{has.get('GPU' if on_card else 'CPU', 0):g}: take fewer --replicas"
            )
        return share, on_card

    def _run(self, ray, serve):
        share, on_card = self._find_share(ray.cluster_resources())
        cores = 1 if share < 2 else int(share)
        self._start(ray, serve)
        deployment = serve.deployment(serve.ingress(self.make_app)()).options(
            name="emu3", num_replicas=self.count, max_ongoing_requests=1000,
            graceful_shutdown_timeout_s=self.drain_seconds, graceful_shutdown_wait_loop_s=0.5,
            ray_actor_options={
                "num_cpus": min(1, share / 2), "num_gpus": int(on_card),
                "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(cores)}},
            },
        )  # fmt: skip
        try:
            serve.run(deployment.bind(), name="emu3", route_prefix="/", blocking=False)
        except (RuntimeError, TimeoutError) as error:
            raise InputError(_reason(error)) from None

    def _start(self, ray, serve):
        """The proxies. Ray gives up on one that takes a while, but starts it again by itself."""
        quiet = serve.schema.LoggingConfig(enable_access_log=False, log_level="ERROR")
        where, end = {"host": self.host, "port": self.port}, time.monotonic() + STARTED_S
        while True:
            try:
                serve.start(proxy_location="EveryNode", http_options=where, logging_config=quiet)
                return
            except (ray.exceptions.RayActorError, TimeoutError) as error:
                if time.monotonic() > end:
                    raise InputError(_reason(error)) from None
            except RuntimeError:  # the proxy's own
                raise InputError(f"a machine of Ray has no port {self.port} free: give another --port") from None

    def __exit__(self, *exception):
        import ray
        from ray import serve
        from ray.serve.exceptions import RayServeException

        if ray.is_initialized():
            with contextlib.suppress(RayServeException):  # it has not come so far
                serve.delete("emu3")  # which waits for what the replicas have; a shutdown alone cuts it off
            if not self.address:
                serve.shutdown()
            ray.shutdown()


def _reason(error):
    lines = [line.strip() for line in str(error).splitlines() if "InputError: " in line]
    return lines[-1].split("InputError: ")[-1] if lines else "the replicas do not start: is this machine busy?"
