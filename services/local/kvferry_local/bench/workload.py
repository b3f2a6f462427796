"""When requests arrive and how long they are. Pure; a seed draws the same again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, get_args

import numpy as np

Pattern = Literal["poisson", "constant", "bursts", "ramp"]
PATTERNS: Final[tuple[Pattern, ...]] = get_args(Pattern)
BURST_S: Final = 10.0  # half of it at three times the mean rate of the other half
SPREAD: Final = 0.25  # sigma of the logarithm of lengths


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to come."""

    at: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()  # names of the prompt's blocks, from a trace; equal names, equal text


def generated(
    pattern: Pattern, rate: float, count: int, prompt_tokens: int, output_tokens: int, seed: int
) -> list[Planned]:
    """`count` requests at `rate` a second on average, with lengths that vary around their medians."""
    draw = np.random.default_rng(seed)
    planned, at = [], 0.0
    for number in range(count):
        planned.append(Planned(at, _length(draw, prompt_tokens), _length(draw, output_tokens)))
        now_rate = rate * _swell(pattern, at, number / max(1, count - 1))
        at += 1 / now_rate if pattern == "constant" else draw.exponential(1 / now_rate)
    return planned


def _swell(pattern: Pattern, at: float, done: float) -> float:
    """The rate of this moment, as a multiple of the mean."""
    if pattern == "bursts":
        return 1.5 if at % BURST_S < BURST_S / 2 else 0.5
    if pattern == "ramp":
        return 0.5 + done  # requests, not time, rise linearly: from half the rate to one and a half
    return 1.0


def _length(draw: np.random.Generator, median: int) -> int:
    return max(1, round(median * math.exp(draw.normal(0.0, SPREAD))))


def fitted(
    trace: Sequence[Planned], count: int | None, rate: float | None, speed: float, scale: float
) -> list[Planned]:
    """A trace's first `count` requests, from time 0 on: `speed` times as fast, or at `rate` a second on average;
    lengths times `scale`."""
    chosen = list(trace[:count])
    if not chosen:
        return []
    start, span = chosen[0].at, chosen[-1].at - chosen[0].at
    factor = 1 / speed if rate is None or span <= 0 else len(chosen) / rate / span
    return [
        replace(
            request,
            at=(request.at - start) * factor,
            prompt_tokens=max(1, round(request.prompt_tokens * scale)),
            output_tokens=max(1, round(request.output_tokens * scale)),
        )
        for request in chosen
    ]
