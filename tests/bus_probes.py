"""What bus tests watch with: a handler that keeps what it gets, a listener that keeps what changes."""

from __future__ import annotations

import asyncio

from kvferry.bus.base import Bus, BusMessage

PATIENCE = 60.0  # seconds until a test stops waiting for what must happen


class Collector:
    """A handler. `await collector.until(count)` waits for as many messages."""

    def __init__(self) -> None:
        self.messages: list[BusMessage] = []
        self._arrived = asyncio.Event()

    def __call__(self, message: BusMessage) -> None:
        self.messages.append(message)
        self._arrived.set()

    @property
    def payloads(self) -> list[bytes]:
        return [message.payload for message in self.messages]

    async def until(self, count: int) -> list[bytes]:
        async with asyncio.timeout(PATIENCE):
            while len(self.messages) < count:
                self._arrived.clear()
                await self._arrived.wait()
        return self.payloads


class Changes:
    """A listener. `await changes.until(True)` waits until the bus is connected."""

    def __init__(self, bus: Bus) -> None:
        self.seen: list[bool] = []
        self._bus = bus
        self._changed = asyncio.Event()
        bus.on_change(self._listen)

    def _listen(self, connected: bool) -> None:
        self.seen.append(connected)
        self._changed.set()

    async def until(self, connected: bool) -> None:
        async with asyncio.timeout(PATIENCE):
            while self._bus.connected is not connected:
                self._changed.clear()
                await self._changed.wait()


class Responder:
    """A handler that answers `re:` and the payload, and can be told to hold its answers back."""

    def __init__(self, *, held: bool = False) -> None:
        self.asked = Collector()
        self._release = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        if not held:
            self._release.set()

    def __call__(self, message: BusMessage) -> None:
        self.asked(message)
        self._tasks.append(asyncio.ensure_future(self._answer(message)))

    async def _answer(self, message: BusMessage) -> None:
        await self._release.wait()
        await message.respond(b"re:" + message.payload)

    async def release(self) -> None:
        self._release.set()
        await asyncio.gather(*self._tasks)
