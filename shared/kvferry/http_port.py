"""uvicorn's HTTP/1.1 server and protocol, bounded: for the gateway's port and for the workers' debug ports.

A connection is never kept for a client that says nothing: from its first moment, or its next request's first byte, a
request has `receive_timeout` to arrive whole, head and body, however often a byte of it comes; between two requests
uvicorn's own `timeout_keep_alive` closes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import Iterator
from http import HTTPStatus
from typing import ClassVar, Final, Self

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES: Final = 64 << 10  # request line and headers
MAX_DISCARDED_BYTES: Final = 16 << 20  # of a body that goes on after its answer; then the connection is closed
TICK_S: Final = 1.0  # the grain of the date in responses
LINGER_S: Final = 1.0  # for a client that goes on sending to read why it was refused


class QuietServer(uvicorn.Server):
    """uvicorn without its signal handlers, since the service has its own, and without its ten wake-ups a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._told_to_end = asyncio.Event()

    def end(self) -> None:
        """Accept no more connections; `serve` returns when those that have a request under way have finished it."""
        self.should_exit = True
        self._told_to_end.set()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # which renews the date that responses carry
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):
                    await self._told_to_end.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class BoundedProtocol(HttpToolsProtocol):
    """One client connection. uvicorn makes it; its limits come from `with_limits`."""

    receive_timeout: ClassVar[float]  # seconds
    max_connections: ClassVar[int | None]  # one more is closed at once

    @classmethod
    def with_limits(cls, receive_timeout: float, max_connections: int | None = None) -> type[Self]:
        """The class for one server. uvicorn takes a class and gives it nothing of ours."""
        return type(cls.__name__, (cls,), {"receive_timeout": receive_timeout, "max_connections": max_connections})

    def refusal(self, status: int, problem: str) -> bytes:
        """The JSON body that says why a request is none."""
        return json.dumps({"error": problem}).encode()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0  # of a head that is not complete yet
        self._discarded_bytes = 0  # of the body under way, since its answer is out
        self._deadline: asyncio.TimerHandle | None = None  # while a request is awaited or arrives
        self._silent = True  # no byte of the request that is awaited has come
        self._refused = False
        if self.max_connections is not None and len(self.connections) > self.max_connections:
            transport.abort()
            return
        self._expect_request()
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # The loops do so, too; an event that waits for the one before to be acknowledged costs 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            self._discard(len(data))
            return
        self._head_bytes += len(data)
        if self.cycle is None or self.cycle.response_complete:
            self._silent = False
            self._expect_request()
        super().data_received(data)
        # The parser keeps an endless header in memory without telling anybody.
        if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._discarded_bytes = 0

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)
        if self.cycle.response_complete:
            self._discard(len(body))

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._forget_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_deadline()

    def _expect_request(self) -> None:
        """Its time runs from now; more bytes of the same request give it no more."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.receive_timeout, self._too_late)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_late(self) -> None:
        self._deadline = None
        if self.transport.is_closing():
            return
        if self._silent or (self.cycle is not None and self.cycle.response_complete and self._discarded_bytes):
            # Nobody waits for an answer: it has not asked yet, or has its answer and trickles on with the body.
            self.transport.abort()
        else:
            self._refuse(408, f"The request did not arrive whole within {self.receive_timeout:g} s.")

    def _discard(self, num_bytes: int) -> None:
        """Read on for a while: to close at once would reset the connection before the client has read why."""
        self._discarded_bytes += num_bytes
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.abort()

    def _refuse(self, status: int, problem: str) -> None:
        """Answer what is no request, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # another answer is under way: this one would be read as a part of it
            return
        body = self.refusal(status, problem)
        self.transport.write(
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        if self.transport.can_write_eof():  # not over TLS
            self.transport.write_eof()
        self._refused = True
        self._forget_deadline()
        self._discarded_bytes = 0
        self.loop.call_later(LINGER_S, self.transport.abort)
