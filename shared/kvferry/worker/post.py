"""From the outbox to the bus."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from kvferry.errors import BusError
from kvferry.wire.messages import Codecs

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker


class Post:
    """Publishes what the outbox has whenever it is woken."""

    def __init__(self, worker: Worker[Any]) -> None:
        self._worker = worker
        self._codecs = Codecs()
        self._some = asyncio.Event()

    def wake(self) -> None:
        """Something waits."""
        self._some.set()

    async def run(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            await self.flush()

    async def flush(self) -> None:
        for subject, batch in self._worker.outbox.take():
            try:
                await self._worker.bus.publish(subject, self._codecs.to_gateway.encode(batch))
            except BusError:
                continue  # the gap in batch_seq makes the gateway ask again
            self._worker.pulse.ride()
