"""Prometheus metrics of one process: an instance owns its registry, so that several services fit in one process.

Names are `kvferry_<noun>_<unit>` in base units (seconds, bytes), singular nouns; the client library itself
appends `_total` to counters.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_NAME: Final = re.compile(r"kvferry(_[a-z][a-z0-9]*)+")
_RESERVED_ENDINGS: Final = ("_total", "_count", "_sum", "_bucket", "_created", "_ms", "_kb", "_mb")

# TTFT, end-to-end: from one engine step on a small model to a long queue.
LATENCY_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# Inter-token latency and engine steps.
STEP_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 1.0, 2.5)


class Metrics:
    """The registry of one process and the only way to add to it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)

    def counter(self, name: str, description: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(_checked(name), description, labels, registry=self.registry)

    def gauge(self, name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(_checked(name), description, labels, registry=self.registry)

    def histogram(
        self, name: str, description: str, labels: Sequence[str] = (), buckets: Sequence[float] = LATENCY_BUCKETS
    ) -> Histogram:
        return Histogram(_checked(name), description, labels, registry=self.registry, buckets=buckets)

    def value(self, name: str, **labels: str) -> float:
        """Of the samples of this exposed name (`…_total` for a counter) that have these labels: their sum."""
        samples = (sample for metric in self.registry.collect() for sample in metric.samples if sample.name == name)
        return sum((sample.value for sample in samples if labels.items() <= sample.labels.items()), 0.0)

    def render(self) -> bytes:
        """Prometheus' text format. Cheap enough for the event loop: a few hundred samples."""
        return generate_latest(self.registry)

    async def asgi(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        """`/metrics` as an ASGI application."""
        body = self.render()
        headers = [(b"content-type", CONTENT_TYPE_LATEST.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name.endswith(_RESERVED_ENDINGS):
        raise ValueError(f"metric {name!r} is not kvferry_<noun>_<unit> in base units")
    return name
