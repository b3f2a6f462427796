"""A real nats-server for tests: on a free port, with credentials, stoppable and freezable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from kvferry.bus.base import BusSettings
from kvferry.bus.rights import BusUser
from kvferry.bus.server import MAX_PAYLOAD, EmbeddedNats


class NatsServer:
    """The embedded server with one user who may do everything, and what a test may do to it."""

    user = "anybody"

    def __init__(self, *, max_payload: int = MAX_PAYLOAD, options: dict[str, Any] | None = None) -> None:
        self.password = os.urandom(24).hex()
        users = [BusUser(self.user, self.password)]
        self.embedded = EmbeddedNats(users, max_payload=max_payload, options=options)

    def settings(self, name: str, **changes: Any) -> BusSettings:
        """Settings of a client with the right credentials."""
        fields: dict[str, Any] = {
            "url": self.embedded.url,
            "name": name,
            "inbox_prefix": f"kvferry.test.inbox.{name}",
            "user": self.user,
            "password": self.password,
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
        """Returns when every thread has stopped: on a busy machine one still answers for a while."""
        os.kill(self.embedded.pid, signal.SIGSTOP)
        threads = Path(f"/proc/{self.embedded.pid}/task").glob("*/stat")
        for stat in list(threads):
            while stat.read_text().rpartition(")")[2].split()[0] != "T":
                time.sleep(0.001)

    def thaw(self) -> None:
        os.kill(self.embedded.pid, signal.SIGCONT)


@asynccontextmanager
async def running_nats(*, max_payload: int = MAX_PAYLOAD) -> AsyncIterator[NatsServer]:
    server = NatsServer(max_payload=max_payload)
    await server.embedded.start()
    try:
        yield server
    finally:
        await server.embedded.stop()
