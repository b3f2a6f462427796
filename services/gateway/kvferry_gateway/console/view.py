"""What the console shows, as JSON has it. It looks at the fleet and changes nothing."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any, Final

from prometheus_client.registry import Collector

from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.placement.placer import shown
from kvferry_gateway.streams.phase import phase_of, progress_of
from kvferry_gateway.streams.stages import STAGES
from kvferry_gateway.streams.timeline import Timeline

MAX_REQUESTS_SHOWN: Final = 256  # under way, the oldest first
MAX_ENDED_SHOWN: Final = 32


def state(fleet: Fleet, moment: float, followed: int | None) -> dict[str, Any]:
    """`followed`: number of the request whose timeline is wanted."""
    timelines = fleet.timelines
    return {
        "cluster": fleet.settings.cluster,
        "gateway": fleet.settings.name,
        "models": [_model(fleet, name) for name in fleet.placers],
        "workers": fleet.registry.rows(moment),
        "num_requests": timelines.num_live,
        "requests": [_row(timeline, moment) for timeline in islice(timelines.live(), MAX_REQUESTS_SHOWN)],
        "ended": [_row(timeline, moment) for timeline in islice(timelines.ended(), MAX_ENDED_SHOWN)],
        "timeline": None if followed is None else _timeline(fleet, followed, moment),
    }


def _model(fleet: Fleet, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "ready": fleet.registry.has_pair(name),
        "ttft": buckets(fleet.metrics.ttft, name),
        "itl": buckets(fleet.metrics.itl, name),
    }


def _row(timeline: Timeline, moment: float) -> dict[str, Any]:
    attempt = timeline.attempt
    prefill = None if attempt is None else attempt.prefill
    phase = timeline.outcome or phase_of(attempt)
    progress = None if attempt is None else progress_of(attempt)
    return {
        "number": timeline.number,
        "request_id": timeline.request_id,
        "model": timeline.model,
        "choice": timeline.choice,
        "phase": phase,
        "progress": progress,
        "prefill": None if prefill is None else prefill.name,
        "decode": None if attempt is None else attempt.decode.name,
        "attempts": timeline.num_attempts,
        "prompt_tokens": timeline.num_prompt,
        "tokens": timeline.num_tokens,
        "seconds": round((timeline.ended_at or moment) - timeline.since, 2),
    }


def _timeline(fleet: Fleet, number: int, moment: float) -> dict[str, Any] | None:
    timeline = fleet.timelines.find(number)
    if timeline is None:
        return None
    shares = timeline.shares(moment)
    return {
        **_row(timeline, moment),
        "stages": [[stage, round(shares[stage], 4)] for stage in STAGES if stage in shares],
        "events": [
            {
                "at_s": round(event.at - timeline.since, 4),
                "what": event.what,
                **{name: shown(fact) for name, fact in event.facts.items()},
            }
            for event in timeline.told()
        ],
    }


def buckets(histogram: Collector, model: str) -> list[tuple[float | None, int]]:
    """(upper bound in seconds, observations in this bucket alone); the last has no bound. Empty before the first."""
    rows: list[tuple[float | None, int]] = []
    below = 0
    for metric in histogram.collect():
        for sample in metric.samples:
            if sample.name.endswith("_bucket") and sample.labels["model"] == model:
                bound, total = float(sample.labels["le"]), int(sample.value)
                rows.append((bound if math.isfinite(bound) else None, total - below))
                below = total
    return rows
