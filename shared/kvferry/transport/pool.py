"""One connection per peer, shared by all that talk to it."""

from __future__ import annotations

import asyncio

from kvferry.errors import ConnectionClosed
from kvferry.transport.base import Connection, Transport


class ConnectionPool:
    """Connects on first use, once for all that ask meanwhile, and forgets a connection when it ends.

    A peer is its address and incarnation: a process that was restarted on the same address is another
    peer, and a connection to it is never handed to somebody who means its predecessor.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._open: dict[tuple[str, int], Connection] = {}
        self._opening: dict[tuple[str, int], asyncio.Task[Connection]] = {}

    def __len__(self) -> int:
        return len(self._open)

    async def get(self, address: str, incarnation: int, timeout: float) -> Connection:
        """A live connection. Raises `ConnectionClosed`, `HandshakeRefused` or TimeoutError, to all that asked;
        `ConnectionClosed` also where another incarnation answers at the address."""
        key = (address, incarnation)
        connection = self._open.get(key)
        if connection is not None and not connection.closed:
            return connection
        task = self._opening.get(key)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._connect(key, timeout), name=f"connect to {address}")
            self._opening[key] = task
            task.add_done_callback(lambda done: self._opened(key, done))
        # Shielded: one caller's cancel must not end the attempt that others wait for.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End attempts and connections."""
        opening = list(self._opening.values())
        for task in opening:
            task.cancel()
        await asyncio.gather(*opening, return_exceptions=True)
        await asyncio.gather(*(connection.close() for connection in list(self._open.values())))

    async def _connect(self, key: tuple[str, int], timeout: float) -> Connection:
        address, incarnation = key
        connection = await self._transport.connect(address, timeout)
        if connection.peer_incarnation != incarnation:
            connection.abort()
            raise ConnectionClosed(f"another incarnation answers at {address}")
        self._open[key] = connection
        connection.on_closed(lambda: self._forget(key, connection))
        return connection

    def _opened(self, key: tuple[str, int], task: asyncio.Task[Connection]) -> None:
        del self._opening[key]
        if not task.cancelled():
            task.exception()  # those who asked have got it; if they are gone, nobody needs it

    def _forget(self, key: tuple[str, int], connection: Connection) -> None:
        if self._open.get(key) is connection:
            del self._open[key]
