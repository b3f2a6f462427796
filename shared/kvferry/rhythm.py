"""Turns at a steady pace that wake nobody who is awake anyway: shortly before one is due it may be taken along."""

from __future__ import annotations

import asyncio
from typing import Final

EARLY: Final = 0.2  # of the interval: so much before it is due a turn may be taken


class Rhythm:
    """Of one task, which awaits `turn` again and again. An early turn does not move those behind it."""

    def __init__(self, interval: float) -> None:
        """`interval` in seconds. The first turn is due one interval after it is asked for."""
        self._interval = interval
        self._due: float | None = None  # the turn that was asked for last
        self._turn: asyncio.Future[None] | None = None

    async def turn(self) -> None:
        """Returns when it is due, or somebody has taken it along. What is late is not made up for."""
        loop = asyncio.get_running_loop()
        moment = loop.time()
        self._due = due = moment + self._interval if self._due is None else max(self._due + self._interval, moment)
        self._turn = loop.create_future()
        timer = loop.call_at(due, self._take)
        try:
            await self._turn
        finally:
            timer.cancel()
            self._turn = None

    def ride(self) -> None:
        """The process is awake and its caches are warm: take a turn that is nearly due along."""
        if self._turn is None or self._due is None:
            return
        if asyncio.get_running_loop().time() >= self._due - EARLY * self._interval:
            self._take()

    def _take(self) -> None:
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)
