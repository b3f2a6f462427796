"""A real nats-server for tests: on a free port, with credentials, stoppable and freezable."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from kvferry.bus.base import BusSettings
from kvferry.bus.server import MAX_PAYLOAD, EmbeddedNats
from kvferry.runtime import SystemRuntime


class NatsServer:
    """The embedded server, and what a test may do to it."""

    def __init__(self, embedded: EmbeddedNats) -> None:
        self.embedded = embedded

    def settings(self, name: str, **changes: Any) -> BusSettings:
        """Settings of a client with the right credentials."""
        fields: dict[str, Any] = {
            "url": self.embedded.url,
            "name": name,
            "inbox_prefix": f"kvferry.test.inbox.{name}",
            "user": self.embedded.user,
            "password": self.embedded.password,
        }
        return BusSettings(**(fields | changes))

    async def kill(self) -> None:
        """SIGKILL: connections break, no goodbye."""
        os.kill(self.embedded.pid, signal.SIGKILL)
        await self.embedded.wait()

    async def restart(self) -> None:
        """On the same port, after `kill`."""
        await self.embedded.start()

    def freeze(self) -> None:
        os.kill(self.embedded.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.embedded.pid, signal.SIGCONT)


@asynccontextmanager
async def running_nats(*, max_payload: int = MAX_PAYLOAD) -> AsyncIterator[NatsServer]:
    embedded = EmbeddedNats(SystemRuntime(), max_payload=max_payload)
    await embedded.start()
    try:
        yield NatsServer(embedded)
    finally:
        await embedded.stop()
