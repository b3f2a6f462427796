"""What befalls a simulated cluster, and the bounds that must hold then."""

from __future__ import annotations

import random
from typing import Any

from cluster import settled
from gateway_core import Call
from world import World

from kvferry.worker.worker import Worker
from kvferry_gateway.attempt import Attempt

ACCEPTED_AGAIN_S = 2.0  # from a worker's end to a new pair for each of its requests
CANCEL_TO_FREE_S = 1.0


def chance_of(seed: int) -> random.Random:
    """Draws for a scenario, apart from those of its workload."""
    return random.Random(f"disturbance {seed}")


def needing(world: World, worker: Worker[Any]) -> list[tuple[Call, Attempt]]:
    """The calls whose present attempt can't do without this worker, as far as their gateway knows."""
    found: list[tuple[Call, Attempt]] = []
    for call in world.calls:
        attempt = None if call.outcome != "open" or call.stream is None else call.stream.attempt
        if attempt is None:
            continue
        as_decode = attempt.decode.incarnation == worker.incarnation
        as_prefill = attempt.prefill is not None and attempt.prefill.incarnation == worker.incarnation
        if as_decode or (as_prefill and not attempt.running):
            found.append((call, attempt))
    return found


async def replaced(affected: list[tuple[Call, Attempt]], lost: Worker[Any], within: float = ACCEPTED_AGAIN_S) -> float:
    """Until each of these calls is over, has a new pair that accepted it, or turns out to have its KV from a lost P."""

    def goes_on(call: Call, before: Attempt) -> bool:
        if call.outcome != "open":
            return True
        attempt = None if call.stream is None else call.stream.attempt
        if attempt is before:
            return before.decode.incarnation != lost.incarnation and before.running and not before.over.done()
        return attempt is not None and attempt.accepted

    return await settled(lambda: all(goes_on(call, before) for call, before in affected), within)


def holds(worker: Worker[Any], attempt: Attempt) -> bool:
    """Whether a worker works on an attempt or still has blocks for it; a step or copy may keep them for a moment."""
    key = (attempt.ticket, attempt.number)
    return key in worker.scheduler.sequences or worker.scheduler.memory.ledger.holding(key) is not None
