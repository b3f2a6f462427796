"""How a leader and a shard on another host speak about hand-offs: messages in order, on an event loop, until either end
is gone."""

from __future__ import annotations

import asyncio
import socket
import struct
from abc import ABC, abstractmethod
from collections import deque
from typing import Final

MAX_MESSAGE_BYTES: Final = 1 << 20  # a block table of the longest context, and a manifest
_LENGTH: Final = struct.Struct("<I")


class ShardChannel(ABC):
    """One end."""

    @abstractmethod
    def send(self, payload: bytes) -> None:
        """Without effect once the other end is gone."""

    @abstractmethod
    async def receive(self) -> bytes | None:
        """The next message; None once the other end is gone."""

    @abstractmethod
    def close(self) -> None: ...


class StreamChannel(ShardChannel):
    """Over a connected TCP socket. Each message stands behind its length."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def open(cls, connected: socket.socket) -> StreamChannel:
        """`connected` is the channel's to close."""
        connected.setblocking(False)
        return cls(*await asyncio.open_connection(sock=connected))

    def send(self, payload: bytes) -> None:
        self._writer.writelines((_LENGTH.pack(len(payload)), payload))

    async def receive(self) -> bytes | None:
        try:
            (length,) = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))
            return None if length > MAX_MESSAGE_BYTES else await self._reader.readexactly(length)
        except (OSError, asyncio.IncompleteReadError):
            return None

    def close(self) -> None:
        self._writer.close()


class DirectChannel(ShardChannel):
    """The twin within one loop: what one end sends the other one has at its next turn."""

    def __init__(self) -> None:
        self._arrived: deque[bytes | None] = deque()
        self._news = asyncio.Event()
        self._other: DirectChannel | None = None

    @classmethod
    def pair(cls) -> tuple[DirectChannel, DirectChannel]:
        one, other = cls(), cls()
        one._other, other._other = other, one
        return one, other

    def send(self, payload: bytes) -> None:
        if self._other is not None:
            self._other._take(payload)

    async def receive(self) -> bytes | None:
        while not self._arrived:
            self._news.clear()
            await self._news.wait()
        return self._arrived.popleft()

    def close(self) -> None:
        other, self._other = self._other, None
        self._take(None)
        if other is not None:
            other._take(None)
            other._other = None

    def _take(self, payload: bytes | None) -> None:
        self._arrived.append(payload)
        self._news.set()
