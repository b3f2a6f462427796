"""Metrics of the gateway."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvferry.metrics import STEP_BUCKETS, Metrics


class HotHistogram(Collector):
    """A histogram for the token path: an observation is a bisection and three additions, without a lock.

    Only the event loop observes it.
    """

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._description = description
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterable[Metric]:
        buckets: list[tuple[str, float]] = []
        total = 0
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        yield HistogramMetricFamily(self._name, self._description, buckets=buckets, sum_value=self._sum)


class GatewayMetrics(Metrics):
    """Names and meanings as in `docs/architecture.md`, "Metrics"."""

    def __init__(self) -> None:
        super().__init__()
        self.requests = self.counter("kvferry_request", "Requests by route and outcome", ("route", "outcome"))
        self.live = self.gauge("kvferry_live_requests", "Requests under way")
        self.ttft = self.histogram("kvferry_ttft_seconds", "From a request's arrival to its first token")
        self.e2e = self.histogram("kvferry_e2e_seconds", "From a request's arrival to its end")
        self.prompt_tokens = self.counter("kvferry_prompt_token", "Tokens of admitted prompts")
        self.generated_tokens = self.counter("kvferry_generated_token", "Tokens delivered to requests")
        self.cached_tokens = self.counter("kvferry_cached_token", "Prompt tokens found in a prefix cache")
        self.placements = self.counter("kvferry_placement", "Accepted placements by kind: pair or local", ("kind",))
        self.replacements = self.counter("kvferry_replacement", "Attempts that ended early, by reason", ("reason",))
        self.refusals = self.counter("kvferry_refusal", "Placements that a worker did not take, by reason", ("reason",))
        self.mismatches = self.counter("kvferry_token_mismatch", "Two different tokens for one index")
        self.late_rows = self.counter("kvferry_late_row", "Tokens for streams that are over")
        self.resends = self.counter("kvferry_resend", "Resends asked for, by what showed the loss", ("cause",))
        self.slow_clients = self.counter("kvferry_slow_client", "Streams cancelled because their client did not read")
        self.cancels = self.counter("kvferry_cancel", "Attempts cancelled by this gateway")
        self.workers_gone = self.counter("kvferry_worker_gone", "Workers judged gone")
        self.bus_drops = self.counter("kvferry_bus_drop", "Messages not sent because the bus was down")
        self.wire_errors = self.counter("kvferry_wire_error", "Messages dropped by kind", ("plane", "kind"))
        self.itl = HotHistogram("kvferry_itl_seconds", "Between two writes of new tokens of a stream", STEP_BUCKETS)
        self.registry.register(self.itl)
