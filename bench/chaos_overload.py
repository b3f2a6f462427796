"""Ten times what a stack can do: what it was able to do it must go on doing, and refuse the rest at once.

Capacity is what a closed loop of as many clients as the workers hold sequences gets: tokens of requests that
finished. Then requests come ten times as often as they finished, whatever becomes of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from bench.chaos_cases import Case, Right
from bench.chaos_clients import Asked, Clients
from bench.contention import Contention
from kvferry.runtime import blocking_clock

FACTOR: Final = 10
TOO_MANY: Final = 429
RAMP_S: Final = 2.0  # until a loop is steady
PROBE_S: Final = 0.1  # between two tries to be admitted after the overload
RECOVERY_LIMIT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Overload:
    """Rates are tokens per second of requests that were admitted; times are seconds."""

    capacity: float
    goodput: float
    offered: float  # requests per second
    num_offered: int
    num_refused: int
    num_failed: int  # neither refused with 429 nor finished right
    refusal_s: tuple[float, ...]  # from sending to 429
    recovery_s: float  # from the last request of the overload to the first token of one that came after it
    granted_s: float  # what the busy machine adds to it


async def overload(
    ports: Sequence[int],
    cases: Sequence[Case],
    right: Mapping[str, Right],
    contention: Contention,
    *,
    num_clients: int,
    seconds: float,
) -> Overload:
    """`cases` are short ones. Ends when every request has ended."""
    calm = Clients(ports, right, "capacity")
    stop = asyncio.Event()
    loop = asyncio.create_task(calm.steady(cases, num_clients, stop))
    await asyncio.sleep(RAMP_S)
    began = blocking_clock()
    await asyncio.sleep(seconds)
    capacity = _tokens_per_s(calm, began, blocking_clock())
    stop.set()
    await loop
    tokens = sum(case.max_tokens for case in cases) / len(cases)
    rate = FACTOR * capacity / tokens
    storm = Clients(ports, right, "overload")
    began = blocking_clock()
    for number in range(round(rate * (RAMP_S + seconds))):
        storm.ask(cases[number % len(cases)])
        await asyncio.sleep(max(0.0, began + (number + 1) / rate - blocking_clock()))
    ended = blocking_clock()
    goodput = _tokens_per_s(storm, began + RAMP_S, ended)
    recovery_s = await _recovery(Clients(ports, right, "probe"), cases, ended)
    granted_s = contention.granted(ended, recovery_s)
    await storm.all_done()
    refused = [asked.so_far.ended - asked.so_far.sent for asked in storm.asked.values() if asked.status == TOO_MANY]
    failed = len(storm.asked) - storm.outcomes()["right"] - len(refused)
    return Overload(
        capacity, goodput, rate, len(storm.asked), len(refused), failed, tuple(refused), recovery_s, granted_s
    )


async def _recovery(probes: Clients, cases: Sequence[Case], since: float) -> float:
    """Until somebody who asks now gets a first token."""
    asked: list[Asked] = []
    while not any(one.so_far.arrivals for one in asked) and blocking_clock() < since + RECOVERY_LIMIT_S:
        if not any(one.outcome is None for one in asked):  # the one before was refused
            probes.ask(cases[len(asked) % len(cases)])
            asked = list(probes.asked.values())
        await asyncio.sleep(PROBE_S)
    first = min((one.so_far.arrivals[0] for one in asked if one.so_far.arrivals), default=blocking_clock())
    await probes.all_done()
    return first - since


def _tokens_per_s(clients: Clients, began: float, ended: float) -> float:
    """Events with text between two moments, of requests that were not refused: one for each token but for few."""
    count = sum(began <= moment <= ended for asked in clients.asked.values() for moment in asked.so_far.arrivals)
    return count / (ended - began)
