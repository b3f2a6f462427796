"""Who waits for workers, and wakes when there is news of them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

Order = tuple[int, float, int]  # priority, arrival, number of a unit: who is placed before whom


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that finds no workers: it has lost its own, or is new and they were there a moment ago."""

    request_id: str
    model: str
    since: float
    why: str


class News:
    """A worker has come, has changed its state, or a heartbeat has passed."""

    def __init__(self) -> None:
        self._sleepers: dict[Order, asyncio.Future[None]] = {}

    async def wait(self, order: Order, stop: asyncio.Future[Exception]) -> None:
        """Until `tell`, or until `stop` is done."""
        news = self._sleepers[order] = asyncio.get_running_loop().create_future()
        try:
            waits: tuple[asyncio.Future[Any], ...] = (news, stop)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._sleepers[order]

    def tell(self) -> None:
        """All wake in their order, so that the urgent and the old are placed before the others."""
        for _, sleeper in sorted(self._sleepers.items()):
            if not sleeper.done():
                sleeper.set_result(None)
