"""How many requests are under way at once, and whether more are taken."""

from __future__ import annotations

import asyncio
from typing import Final

from kvferry_gateway.errors import shutting_down, too_many_requests
from kvferry_gateway.metrics import GatewayMetrics

RETRY_AFTER_S: Final = 1.0


class Admission:
    """One gateway's. Each choice counts as a request does."""

    def __init__(self, metrics: GatewayMetrics, max_requests: int) -> None:
        self.draining = False  # no more are taken
        self.num_live = 0
        self._metrics = metrics
        self._max_requests = max_requests
        self._idle = asyncio.Event()
        self._idle.set()

    def admit(self, num_choices: int) -> None:
        """Raises `ApiError` 429 or 503."""
        if self.draining:
            raise shutting_down()
        if num_choices and self.num_live + num_choices > self._max_requests:
            raise too_many_requests("The gateway has as many requests as it takes; try again later.", RETRY_AFTER_S)
        self.num_live += num_choices
        self._metrics.live.set(self.num_live)
        self._idle.clear()

    def release(self, num_choices: int) -> None:
        self.num_live -= num_choices
        self._metrics.live.set(self.num_live)
        if self.num_live == 0:
            self._idle.set()

    async def idle(self) -> None:
        """Until nothing is under way."""
        await self._idle.wait()
