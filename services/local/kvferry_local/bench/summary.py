"""What the clients of a load saw: latencies, throughput, goodput. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kvferry_local.bench.client import Outcome

PERCENTILES = (0.5, 0.9, 0.99)


def percentile(ordered: Sequence[float], share: float) -> float:
    """By nearest rank, of at least one value, in order."""
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


@dataclass(frozen=True, slots=True)
class Spread:
    """Of one kind of latency, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """By nearest rank; None of nothing."""
        if not values:
            return None
        ordered = sorted(values)
        p50, p90, p99 = (percentile(ordered, share) for share in PERCENTILES)
        return cls(sum(ordered) / len(ordered), p50, p90, p99, ordered[-1])


@dataclass(frozen=True, slots=True)
class Summary:
    num_requests: int
    num_whole: int
    errors: dict[str, int]  # by kind
    seconds: float  # from the first request to the last answer
    requests_per_s: float
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Spread | None
    itl: Spread | None  # between two events of one stream
    tpot: Spread | None  # mean of each request
    e2e: Spread | None
    lateness: Spread | None  # of this client: how much later than due requests were sent
    ttft_target_s: float
    tpot_target_s: float
    goodput: float  # share of all requests that were whole within both targets
    goodput_per_s: float

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], ttft_target_s: float, tpot_target_s: float) -> Summary:
        """Of at least one request."""
        whole = [outcome for outcome in outcomes if not outcome.error]
        began, ended = min(outcome.due for outcome in outcomes), max(outcome.ended for outcome in outcomes)
        seconds = max(ended - began, 1e-9)
        good = sum(outcome.ttft_s <= ttft_target_s and outcome.tpot_s <= tpot_target_s for outcome in whole)
        return cls(
            num_requests=len(outcomes),
            num_whole=len(whole),
            errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error)),
            seconds=seconds,
            requests_per_s=len(whole) / seconds,
            prompt_tokens_per_s=sum(outcome.prompt_tokens for outcome in whole) / seconds,
            output_tokens_per_s=sum(outcome.output_tokens for outcome in whole) / seconds,
            ttft=Spread.of([outcome.ttft_s for outcome in whole]),
            itl=Spread.of([gap for outcome in whole for gap in outcome.gaps]),
            tpot=Spread.of([outcome.tpot_s for outcome in whole if outcome.output_tokens > 1]),
            e2e=Spread.of([outcome.ended - outcome.sent for outcome in whole]),
            lateness=Spread.of([outcome.sent - outcome.due for outcome in outcomes if outcome.sent]),
            ttft_target_s=ttft_target_s,
            tpot_target_s=tpot_target_s,
            goodput=good / len(outcomes),
            goodput_per_s=good / seconds,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def text(summary: Summary) -> str:
    """The table that is printed."""
    lines = [
        f"{summary.num_whole:,} of {summary.num_requests:,} requests whole in {summary.seconds:,.1f} s: "
        f"{summary.requests_per_s:,.2f} requests/s, {summary.prompt_tokens_per_s:,.0f} prompt and "
        f"{summary.output_tokens_per_s:,.0f} output tokens/s",
        "",
        f"{'ms':10}{'mean':>10}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}",
    ]
    rows = ("TTFT", summary.ttft), ("ITL", summary.itl), ("TPOT", summary.tpot), ("E2E", summary.e2e)
    for label, spread in (*rows, ("sent late", summary.lateness)):
        if spread is not None:
            cells = "".join(f"{1e3 * getattr(spread, column):10,.1f}" for column in Spread.__slots__)
            lines.append(f"{label:10}{cells}")
    lines += [
        "",
        f"goodput: {summary.goodput:.1%} of the requests, {summary.goodput_per_s:,.2f} a second, with TTFT ≤ "
        f"{summary.ttft_target_s:g} s and TPOT ≤ {1e3 * summary.tpot_target_s:g} ms",
    ]
    if summary.errors:
        lines.append("errors: " + ", ".join(f"{count} × {kind}" for kind, count in sorted(summary.errors.items())))
    return "\n".join(lines)
