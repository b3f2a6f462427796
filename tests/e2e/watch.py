"""The bench's listener on a stack's bus, for tests: they wait for what it hears."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from bench.tap import Heard, Tap

from kvferry.bus.base import Bus

PATIENCE_S: Final = 90.0  # many times what anything here takes on a machine that is busy besides


class Watch(Tap):
    """What was heard so far; `until` waits for more."""

    def __init__(self, bus: Bus, cluster: str) -> None:
        super().__init__(bus, cluster)
        self._news = asyncio.Event()

    def changed(self) -> None:
        self._news.set()

    async def until(self, holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
        """Returns at the first message after which `holds()`."""
        async with asyncio.timeout(seconds):
            while not holds():
                self._news.clear()
                await self._news.wait()

    async def accepted(self, label: str, *, attempts: int = 1) -> Heard:
        """Once the `attempts`-th attempt of a request has been accepted."""

        def holds() -> bool:
            heard = self.requests.get(label)
            return heard is not None and sum(a.accepted_at is not None for a in heard.attempts.values()) >= attempts

        await self.until(holds)
        return self.requests[label]

    async def given(self, label: str, count: int) -> Heard:
        """Once generated index `count - 1` of a request has been heard from its last attempt, or was there before."""

        def holds() -> bool:
            heard = self.requests.get(label)
            return heard is not None and (count - 1 in heard.last.tokens or len(heard.last.held) >= count)

        await self.until(holds)
        return self.requests[label]
