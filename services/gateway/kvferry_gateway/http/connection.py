"""The client's end of a stream: bytes out, and the news that the client is slow or gone.

Two kinds: `TransportConnection` writes straight to the socket (`server.py` makes it), `AsgiConnection` goes
through plain ASGI and serves servers that are not ours, and simulations without sockets.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

EXTENSION: Final = "kvferry.connection"  # key in scope["extensions"]


def _nothing() -> None:
    pass


class ClientConnection(ABC):
    """One client connection, as one request sees it.

    `paused`: the client reads too slowly, write no more for now. `lost`: nobody reads any more. `last_write`: the
    moment of it, by whichever choice, as those that write note it.
    """

    __slots__ = ("_on_lost", "_on_resume", "last_write", "lost", "paused")

    def __init__(self) -> None:
        self.paused = False
        self.lost = False
        self.last_write = 0.0
        self._on_lost: Callable[[], None] = _nothing
        self._on_resume: Callable[[], None] = _nothing

    def watch(self, on_lost: Callable[[], None], on_resume: Callable[[], None]) -> None:
        """Call these on the loop; `on_lost` at most once. One watcher at a time."""
        self._on_lost = on_lost
        self._on_resume = on_resume

    def unwatch(self) -> None:
        self._on_lost = self._on_resume = _nothing

    def note_lost(self) -> None:
        if not self.lost:
            self.lost = True
            self._on_lost()

    def note_paused(self) -> None:
        self.paused = True

    def note_resumed(self) -> None:
        self.paused = False
        self._on_resume()

    def write(self, body: bytes) -> None:
        """Send a piece of the body, after the head has been sent. Never waits."""
        if body and not self.lost:
            self.put(self.pack(body))

    @abstractmethod
    def pack(self, body: bytes) -> bytes:
        """A piece of the body, which is not empty, as it goes over the wire."""

    @abstractmethod
    def put(self, packed: bytes) -> None:
        """The second half of `write`, for whoever writes to many connections: their kernel calls, one behind the
        other, find each other's code and data in the processor's caches. Not of one that is lost."""

    @abstractmethod
    def abort(self) -> None:
        """End the connection now, without what is still buffered."""

    @abstractmethod
    async def close(self) -> None:
        """The request is over: wait until all that was written is out of our hands. Never raises."""


class TransportConnection(ClientConnection):
    """Chunks of chunked encoding (HTTP/1.1), written to the transport at once."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport

    def pack(self, body: bytes) -> bytes:
        return b"%x\r\n%b\r\n" % (len(body), body)

    def put(self, packed: bytes) -> None:
        self._transport.write(packed)

    def abort(self) -> None:
        self._transport.abort()

    async def close(self) -> None:
        self.unwatch()


class AsgiConnection(ClientConnection):
    """One task sends, one waits for the disconnect. `max_pending` bytes unsent count as slow."""

    def __init__(self, receive: Receive, send: Send, max_pending: int = 1 << 16) -> None:
        super().__init__()
        self._receive = receive
        self._send = send
        self._max_pending = max_pending
        self._pending = bytearray()
        self._some = asyncio.Event()
        self._closing = False
        loop = asyncio.get_running_loop()
        self._sender = loop.create_task(self._send_all(), name="asgi-send")
        self._listener = loop.create_task(self._listen(), name="asgi-disconnect")

    def pack(self, body: bytes) -> bytes:
        return body

    def put(self, packed: bytes) -> None:
        self._pending += packed
        self._some.set()
        if len(self._pending) > self._max_pending and not self.paused:
            self.note_paused()

    def abort(self) -> None:
        self._pending.clear()
        self.note_lost()
        self._some.set()

    async def close(self) -> None:
        self.unwatch()
        self._closing = True
        self._some.set()
        self._listener.cancel()
        await asyncio.gather(self._sender, self._listener, return_exceptions=True)

    async def _send_all(self) -> None:
        while not self.lost:
            await self._some.wait()
            self._some.clear()
            while self._pending:
                body = bytes(self._pending)
                self._pending.clear()
                try:
                    await self._send({"type": "http.response.body", "body": body, "more_body": True})
                except OSError:  # as ASGI servers report a client that is gone
                    self.note_lost()
                    return
                if self.paused and not self._pending:
                    self.note_resumed()
            if self._closing:
                return

    async def _listen(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.note_lost()
        self._some.set()
