# Licensed under the Apache License, Version 2.0; see LICENSE.
"""The service in several processes, on one machine or more, behind one address: Ray Serve spreads the requests."""

import contextlib

from paddlemix.jobs.actors import NEEDED, connect
from paddlemix.utils import InputError

STARTED_S = 1800  # for the models to be loaded


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

    def _run(self, ray, serve):
        import paddle

        has = ray.cluster_resources()
        on_card = paddle.get_device() != "cpu"
        share = 1 if on_card else has.get("CPU", 0) / self.count  # of the processors of the cluster
        if share < 0.5 or on_card and has.get("GPU", 0) < self.count:
            raise InputError(
                f"{self.count} replicas need {'a card' if on_card else 'half a processor'} each, Ray has "
                f"{has.get('GPU' if on_card else 'CPU', 0):g}: take fewer --replicas"
            )
        cores = 1 if share < 2 else int(share)
        quiet = serve.schema.LoggingConfig(enable_access_log=False, log_level="ERROR")
        where = {"host": self.host, "port": self.port}
        serve.start(proxy_location="EveryNode", http_options=where, logging_config=quiet)
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
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if "InputError" in line]
            raise InputError(lines[-1].split("InputError: ")[-1] if lines else "the replicas do not start") from None

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
