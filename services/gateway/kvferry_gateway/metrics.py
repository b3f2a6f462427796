"""Metrics of the gateway."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate, product
from typing import Final, Literal, get_args

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from kvferry.metrics import STEP_BUCKETS, Metrics
from kvferry_gateway.reasons import LOST_REASONS, REFUSAL_REASONS

MODEL: Final = ("model",)  # empty where a request named none that is served

Route = Literal["chat", "text", "responses"]
ALERTING: Final = ("no_worker", "rate_limit_exceeded")  # outcomes of which alerts must see the first one


class HotHistogram(Collector):
    """Histograms by model for the token path: an observation is a bisection and a few additions, without a lock.

    Only the event loop observes it.
    """

    labels: Final = MODEL

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name = name
        self._description = description
        self._bounds = tuple(bounds)
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def begin(self, model: str) -> None:
        """Show this model's, with nothing observed yet."""
        self._counts[model] = [0] * (len(self._bounds) + 1)
        self._sums[model] = 0.0

    def observe(self, model: str, value: float, times: int = 1) -> None:
        """`model` has begun."""
        self._counts[model][bisect_left(self._bounds, value)] += times
        self._sums[model] += value * times

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._description, labels=self.labels)
        bounds = (*map(str, self._bounds), "+Inf")
        for model, counts in self._counts.items():
            totals = zip(bounds, accumulate(counts), strict=True)
            family.add_metric([model], [(bound, float(total)) for bound, total in totals], self._sums[model])
        yield family


class GatewayMetrics(Metrics):
    """Names and meanings as in `docs/architecture.md`, "Metrics"."""

    def __init__(self, models: Iterable[str] = ()) -> None:
        """`models`: all that this gateway serves. Their series begin at 0, so that a first event is seen as one."""
        super().__init__()
        self.requests = self.counter("kvferry_request", "Requests by route and outcome", (*MODEL, "route", "outcome"))
        self.live = self.gauge("kvferry_live_requests", "Requests under way", MODEL)
        self.ttft = self.histogram("kvferry_ttft_seconds", "From a request's arrival to its first token", MODEL)
        self.e2e = self.histogram("kvferry_e2e_seconds", "From a request's arrival to its end", MODEL)
        self.prompt_tokens = self.counter("kvferry_prompt_token", "Tokens of admitted prompts", MODEL)
        self.generated_tokens = self.counter("kvferry_generated_token", "Tokens delivered to requests", MODEL)
        self.cached_tokens = self.counter("kvferry_cached_token", "Prompt tokens found in a prefix cache", MODEL)
        self.placements = self.counter(
            "kvferry_placement", "Accepted placements by kind: pair or local", (*MODEL, "kind")
        )
        self.replacements = self.counter(
            "kvferry_replacement", "Attempts that ended early, by reason", (*MODEL, "reason")
        )
        self.refusals = self.counter(
            "kvferry_refusal", "Placements that a worker did not take, by reason", (*MODEL, "reason")
        )
        self.mismatches = self.counter("kvferry_token_mismatch", "Two different tokens for one index")
        self.late_rows = self.counter("kvferry_late_row", "Tokens for streams that are over")
        self.resends = self.counter("kvferry_resend", "Resends asked for, by what showed the loss", ("cause",))
        self.slow_clients = self.counter("kvferry_slow_client", "Streams cancelled because their client did not read")
        self.cancels = self.counter("kvferry_cancel", "Attempts cancelled by this gateway")
        self.workers_gone = self.counter("kvferry_worker_gone", "Workers judged gone")
        self.bus_drops = self.counter("kvferry_bus_drop", "Messages not sent because the bus was down")
        self.wire_errors = self.counter("kvferry_wire_error", "Messages dropped by kind", ("plane", "kind"))
        self.spans = self.counter("kvferry_span", "Spans of traces by outcome: sent, failed, dropped", ("outcome",))
        self.itl = HotHistogram("kvferry_itl_seconds", "Between two writes of new tokens of a stream", STEP_BUCKETS)
        self.registry.register(self.itl)
        for model in models:
            self.itl.begin(model)
            self.live.labels(model)
            for metric in (self.ttft, self.e2e, self.prompt_tokens, self.generated_tokens, self.cached_tokens):
                metric.labels(model)
            for kind in ("pair", "local"):
                self.placements.labels(model, kind)
            for reason in LOST_REASONS:
                self.replacements.labels(model, reason)
            for reason in REFUSAL_REASONS:
                self.refusals.labels(model, reason)
            for route, outcome in product(get_args(Route), ALERTING):
                self.requests.labels(model, route, outcome)
