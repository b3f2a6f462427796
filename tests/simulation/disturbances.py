"""Whom a disturbance would hit, and the bounds that must hold after one."""

from __future__ import annotations

import random
from typing import Any

from clients import Call
from cluster import settled
from world import World

from kvferry.worker.worker import Worker
from kvferry_gateway.flights.flight import Flight
from kvferry_gateway.streams.attempt import Attempt

ACCEPTED_AGAIN_S = 2.0  # from a worker's end to a new pair for each of its requests
CANCEL_TO_FREE_S = 1.0

Live = tuple[Call, Flight, Attempt]


def chance_of(seed: int) -> random.Random:
    """Draws for a scenario, apart from those of its workload."""
    return random.Random(f"disturbance {seed}")


def live_attempts(world: World) -> list[Live]:
    """The present attempts of all calls under way, as far as their gateways know."""
    found: list[Live] = []
    for call in world.calls:
        gateway = call.gateway
        if call.outcome != "open" or gateway is None or not gateway.alive:
            continue
        for flight in gateway.flights(call):
            if (attempt := flight.stream.attempt) is not None:
                found.append((call, flight, attempt))
    return found


def needing(world: World, worker: Worker[Any]) -> list[Live]:
    """Those that can't do without this worker."""

    def needs(attempt: Attempt) -> bool:
        as_decode = attempt.decode.incarnation == worker.incarnation
        as_prefill = attempt.prefill is not None and attempt.prefill.incarnation == worker.incarnation
        return as_decode or (as_prefill and not attempt.running)

    return [live for live in live_attempts(world) if needs(live[2])]


async def replaced(affected: list[Live], lost: Worker[Any], within: float = ACCEPTED_AGAIN_S) -> float:
    """Until each of these is over, has a new pair that accepted it, or turns out to have its KV from a lost P."""

    def goes_on(call: Call, flight: Flight, before: Attempt) -> bool:
        if call.outcome != "open" or flight._stop.done():
            return True
        attempt = flight.stream.attempt
        if attempt is before:
            return before.decode.incarnation != lost.incarnation and before.running and not before.over.done()
        return attempt is not None and attempt.accepted

    return await settled(lambda: all(goes_on(*live) for live in affected), within)


def holds(worker: Worker[Any], attempt: Attempt) -> bool:
    """Whether a worker works on an attempt or still has blocks for it; a step or copy may keep them for a moment."""
    key = (attempt.ticket, attempt.number)
    return key in worker.scheduler.sequences or worker.scheduler.memory.ledger.holding(key) is not None
