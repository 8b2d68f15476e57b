# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Numbers for Prometheus: requests as they end, and what the engine counts."""

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
GAUGES = {
    "emu3_queue_depth": ("queue_depth", "Jobs that wait."),
    "emu3_running": ("running", "Jobs that are in the batch."),
    "emu3_batch_rows": ("batch_rows", "Rows of the batch."),
}


class Metrics:
    """A registry of its own, so that several apps in a process do not count together."""

    def __init__(self, engine):
        self.engine, self.registry = engine, CollectorRegistry()
        self.requests = Counter(
            "emu3_requests", "Requests that have ended.", ["endpoint", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "emu3_request_seconds", "From a request's start to its end.", ["endpoint"], buckets=SECONDS,
            registry=self.registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "emu3_time_to_first_token_seconds", "From a request's start to its first token.", ["endpoint"],
            buckets=SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def collect(self):
        stats = self.engine.stats()
        for name, (key, text) in GAUGES.items():
            yield GaugeMetricFamily(name, text, stats.get(key, 0))
        yield CounterMetricFamily("emu3_tokens", "Tokens that were decoded.", stats.get("tokens_total", 0))

    def ended(self, endpoint, status, seconds, to_first_token):
        self.requests.labels(endpoint, str(status)).inc()
        self.seconds.labels(endpoint).observe(seconds)
        if to_first_token is not None:
            self.first_token.labels(endpoint).observe(to_first_token)
