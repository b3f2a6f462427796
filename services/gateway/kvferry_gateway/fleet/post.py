"""Messages to workers that need no answer, in the order in which they were posted."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from kvferry.bus.base import Bus
from kvferry.errors import BusError


class Post:
    """`send` may be called from anywhere on the loop and never waits; one task publishes.

    While the bus is down messages are dropped: a worker learns from the next heartbeat what a lost cancel
    would have told it, and repeats what a lost acknowledgement would have ended.
    """

    def __init__(self, bus: Bus, on_drop: Callable[[], None]) -> None:
        self._bus = bus
        self._on_drop = on_drop
        self._waiting: deque[tuple[str, bytes]] = deque()
        self._some = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def send(self, subject: str, payload: bytes) -> None:
        self._waiting.append((subject, payload))
        self._some.set()
        self._idle.clear()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                subject, payload = self._waiting.popleft()
                try:
                    await self._bus.publish(subject, payload)
                except BusError:
                    self._on_drop()
            self._idle.set()

    async def flushed(self) -> None:
        """Returns when everything posted so far has been published or dropped."""
        await self._idle.wait()
