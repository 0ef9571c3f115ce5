"""What is measured of a server, for Prometheus: times at the door, and what schedulers count."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

# Seconds: a step of 1 ms to a prompt that waits for a minute, in steps of about 1.6.
_TIMES = (
    0.001, 0.0016, 0.0025, 0.004, 0.006, 0.01, 0.016, 0.025, 0.04, 0.06, 0.1, 0.16, 0.25, 0.4, 0.6, 1.0, 1.6, 2.5, 4.0, 6.0,
    10.0, 16.0, 25.0, 40.0, 60.0,
)  # fmt: skip
# Of `Scheduler.counts`: what is now, and totals.
_NOW = {
    "slots": "Decode slots.",
    "occupied": "Decode slots that hold a request.",
    "queued": "Requests that wait for a slot.",
    "oldest_queued_s": "Age of the oldest request that waits, seconds.",
    "stopped": "1 if the scheduler has stopped for good.",
    "heartbeat_age_s": "Time since the step thread last went round, seconds.",
}
_TOTALS = {
    "submitted": "Requests that were queued.",
    "finished": "Requests that ended by themselves.",
    "cancelled": "Requests that were cancelled.",
    "failed": "Requests that a program failed on.",
    "rejected": "Requests that the scheduler refused.",
    "prefills": "Calls of prefill programs.",
    "decode_steps": "Decode steps.",
    "padded_rows": "Rows of padding behind text.",
    "text_rows": "Rows of text.",
    "feature_hits": "Pictures whose features were kept.",
    "feature_misses": "Pictures that were encoded.",
}


class Metrics:
    """counts: the schedulers' counts by model, asked when somebody looks."""

    def __init__(self, counts: Callable[[], Mapping[str, Mapping[str, float]]]):
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry}
        self.ttft = Histogram(
            "vitcop_time_to_first_token_seconds",
            "From a request's last byte to its first token.",
            ["model"],
            buckets=_TIMES,
            **own,
        )
        self.tpot = Histogram(
            "vitcop_time_per_output_token_seconds",
            "Between tokens of an answer, in the mean.",
            ["model"],
            buckets=_TIMES,
            **own,
        )
        self.requests = Counter(
            "vitcop_http_requests", "Answers by status; 499: the client went before it.", ["model", "status"], **own
        )
        self.broken = Counter("vitcop_broken_streams", "Streams that ended with an error event.", ["model"], **own)
        self.vanished = Counter("vitcop_vanished_clients", "Clients that went before their answer ended.", ["model"], **own)
        self._registry.register(_Counts(counts))

    def text(self) -> bytes:
        """All of them, in the text format of Prometheus."""
        return generate_latest(self._registry)


class _Counts(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, Mapping[str, float]]]):
        self._counts = counts

    def collect(self) -> Iterator[Any]:
        found = self._counts()
        for kind, names in ((GaugeMetricFamily, _NOW), (CounterMetricFamily, _TOTALS)):
            for name, text in names.items():
                family = kind(
                    f"vitcop_{name.removesuffix('_s')}{'_seconds' if name.endswith('_s') else ''}", text, labels=["model"]
                )
                for model, values in found.items():
                    if name in values:
                        family.add_metric([model], values[name])
                yield family
