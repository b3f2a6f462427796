"""How many requests are under way at once, and whether more are taken."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from kvferry_gateway.errors import ApiError, shutting_down, too_many_requests
from kvferry_gateway.metrics import GatewayMetrics

RETRY_AFTER_S: Final = 1.0


class Admission:
    """One gateway's. Each model has a bound of its own, so that a crowd at one never turns away another one's requests.

    Each choice counts as a request does.
    """

    def __init__(self, metrics: GatewayMetrics, max_requests: int, models: Sequence[str]) -> None:
        """`max_requests`: of one model."""
        self.draining = False  # no more are taken
        self._metrics = metrics
        self._max_requests = max_requests
        self._live = dict.fromkeys(models, 0)
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_live(self) -> int:
        return sum(self._live.values())

    def check(self) -> None:
        """Before it is known which model a request wants. Raises `ApiError` 429 or 503."""
        if self.draining:
            raise shutting_down()
        if self.num_live >= self._max_requests * len(self._live):
            raise _full()

    def admit(self, model: str, num_choices: int) -> None:
        """Raises `ApiError` 429 or 503."""
        if self.draining:
            raise shutting_down()
        if num_choices and self._live[model] + num_choices > self._max_requests:
            raise _full()
        self._count(model, num_choices)
        self._idle.clear()

    def release(self, model: str, num_choices: int) -> None:
        self._count(model, -num_choices)
        if self.num_live == 0:
            self._idle.set()

    def _count(self, model: str, num_choices: int) -> None:
        self._live[model] += num_choices
        self._metrics.live.labels(model).set(self._live[model])

    async def idle(self) -> None:
        """Until nothing is under way."""
        await self._idle.wait()


def _full() -> ApiError:
    return too_many_requests("The gateway has as many requests as it takes; try again later.", RETRY_AFTER_S)
