"""Transports of each backend for tests, and an end-to-end pair of connections."""

from __future__ import annotations

import asyncio
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kvferry.runtime import SystemRuntime
from kvferry.transport.base import Connection, Transport, TransportSettings
from kvferry.transport.memory import MemoryLink, MemoryNetwork, MemoryTransport
from kvferry.transport.tcp import TcpTransport
from kvferry.transport.ucx import UcxLink, UcxTransport
from kvferry.transport.ucx_endpoint import Endpoint

PATIENCE = 60.0  # seconds until a test gives up on an event
DATA_KEY = b"the data key of the test cluster"


@dataclass
class Pair:
    """One connection, seen from both ends."""

    near: Connection  # of the one that connected
    far: Connection


class Arrivals:
    """What `on_connection` and `on_message` got, to be waited for."""

    def __init__(self) -> None:
        self._connections: asyncio.Queue[Connection] = asyncio.Queue()

    def __call__(self, connection: Connection) -> None:
        self._connections.put_nowait(connection)

    @property
    def empty(self) -> bool:
        return self._connections.empty()

    async def next(self) -> Connection:
        return await asyncio.wait_for(self._connections.get(), PATIENCE)


class Messages:
    """Flow messages of one connection, in order."""

    def __init__(self, connection: Connection) -> None:
        self._queue: asyncio.Queue[bytes] = asyncio.Queue()
        connection.on_message(lambda message: self._queue.put_nowait(bytes(message)))

    async def take(self, count: int) -> list[bytes]:
        return [await asyncio.wait_for(self._queue.get(), PATIENCE) for _ in range(count)]


class Backends(ABC):
    """Makes transports of one backend, and closes them."""

    def __init__(self) -> None:
        self._made: list[Transport] = []
        self.arrivals: dict[Transport, Arrivals] = {}

    def make(self, incarnation: int, **settings: Any) -> Transport:
        fields = {"incarnation": incarnation, "data_key": DATA_KEY, **settings}
        transport = self._make(TransportSettings(**fields))
        self._made.append(transport)
        return transport

    async def started(self, incarnation: int, **settings: Any) -> Transport:
        transport = self.make(incarnation, **settings)
        self.arrivals[transport] = Arrivals()
        await transport.start(self.arrivals[transport])
        return transport

    async def connected(self, one: Transport, other: Transport) -> Pair:
        near = await one.connect(other.address, PATIENCE)
        return Pair(near, await self.arrivals[other].next())

    async def pair(self) -> Pair:
        return await self.connected(await self.started(1), await self.started(2))

    async def pair_again(self) -> Pair:
        """Another connection between the first two transports."""
        one, other = list(self.arrivals)[:2]
        return await self.connected(one, other)

    async def close(self) -> None:
        for transport in self._made:
            await transport.close()

    @abstractmethod
    def _make(self, settings: TransportSettings) -> Transport: ...

    @abstractmethod
    async def say_nothing(self, host: Transport) -> None:
        """Connect and never send a hello."""

    @abstractmethod
    async def unreachable(self) -> str:
        """An address at which nobody listens."""


class MemoryBackends(Backends):
    def __init__(self) -> None:
        super().__init__()
        self.network = MemoryNetwork()

    def _make(self, settings: TransportSettings) -> Transport:
        return MemoryTransport(settings, SystemRuntime(), self.network, f"process-{settings.incarnation}")

    async def say_nothing(self, host: Transport) -> None:
        assert isinstance(host, MemoryTransport)
        loop = asyncio.get_running_loop()
        name = urlsplit(host.address).netloc
        mute = MemoryLink(self.network, "mute", name, host.counters, loop)
        peer = MemoryLink(self.network, name, "mute", host.counters, loop)
        mute.peer, peer.peer = peer, mute
        host.admit(peer)
        await ended(mute)

    async def unreachable(self) -> str:
        return "memory://nobody"


class TcpBackends(Backends):
    def _make(self, settings: TransportSettings) -> Transport:
        return TcpTransport(settings, SystemRuntime())

    async def say_nothing(self, host: Transport) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(host.address).port)
        try:
            await asyncio.wait_for(reader.read(), PATIENCE)  # their hello, then the end
        finally:
            writer.close()
            await writer.wait_closed()

    async def unreachable(self) -> str:
        return f"tcp://127.0.0.1:{unused_port()}"


class UcxBackends(Backends):
    def _make(self, settings: TransportSettings) -> Transport:
        return UcxTransport(settings, SystemRuntime())

    async def say_nothing(self, host: Transport) -> None:
        mute = await self.started(99)
        assert isinstance(mute, UcxTransport)
        link = UcxLink(mute.worker, Endpoint(), mute.counters, asyncio.get_running_loop())
        link.connect("127.0.0.1", urlsplit(host.address).port or 0)
        await ended(link)

    async def unreachable(self) -> str:
        return f"ucx://127.0.0.1:{unused_port()}"


@asynccontextmanager
async def backends(kind: type[Backends]) -> AsyncIterator[Backends]:
    made = kind()
    try:
        yield made
    finally:
        await made.close()


async def ended(connection: Connection) -> None:
    done = asyncio.Event()
    connection.on_closed(done.set)
    await asyncio.wait_for(done.wait(), PATIENCE)


def unused_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


async def patiently(future: Any) -> Any:
    """The outcome of a transport's future, which a timeout must not cancel."""
    return await asyncio.wait_for(asyncio.shield(future), PATIENCE)
