"""uvicorn's HTTP/1.1 protocol, with the socket handed to the route.

A route finds a `TransportConnection` in `scope["extensions"]`: after the head of the response has been sent
the ordinary way, it writes the body straight to the transport, and ends it the ordinary way.

A connection is never kept for a client that says nothing: from its first moment, or its next request's first byte, a
request has `receive_timeout` to arrive whole, head and body, however often a byte of it comes; between two requests
uvicorn's own `timeout_keep_alive` closes it.
"""

from __future__ import annotations

import asyncio
import socket
from http import HTTPStatus
from typing import ClassVar, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvferry_gateway.connection import EXTENSION, TransportConnection
from kvferry_gateway.errors import ApiError, bad_request, request_timeout

MAX_HEAD_BYTES: Final = 64 << 10  # request line and headers
MAX_DISCARDED_BYTES: Final = 16 << 20  # of a body that goes on after its answer; then the connection is closed
LINGER_S: Final = 1.0  # for a client that goes on sending to read why it was refused


class GatewayProtocol(HttpToolsProtocol):
    """One client connection. uvicorn makes it; `receive_timeout` comes from `with_receive_timeout`."""

    receive_timeout: ClassVar[float]  # seconds

    @classmethod
    def with_receive_timeout(cls, seconds: float) -> type[GatewayProtocol]:
        """The class for one server. uvicorn takes a class and gives it nothing of ours."""
        return type(cls.__name__, (cls,), {"receive_timeout": seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._client = TransportConnection(transport)
        self._head_bytes = 0  # of a head that is not complete yet
        self._discarded_bytes = 0  # of the body under way, since its answer is out
        self._deadline: asyncio.TimerHandle | None = None  # while a request is awaited or arrives
        self._silent = True  # no byte of the request that is awaited has come
        self._refused = False
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
            self._refuse(ApiError(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._discarded_bytes = 0
        self.scope["extensions"] = {EXTENSION: self._client}  # type: ignore[dict-item]

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
        self._refuse(bad_request(msg, code="invalid_http"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._forget_deadline()
        self._client.note_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.note_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client.note_resumed()

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
            self._refuse(request_timeout(self.receive_timeout))

    def _discard(self, num_bytes: int) -> None:
        """Read on for a while: to close at once would reset the connection before the client has read why."""
        self._discarded_bytes += num_bytes
        if self._discarded_bytes > MAX_DISCARDED_BYTES:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # another answer is under way: this one would be read as a part of it
            return
        reason = HTTPStatus(error.status).phrase
        body = error.body
        self.transport.write(
            f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.write_eof()
        self._refused = True
        self._forget_deadline()
        self._discarded_bytes = 0
        self.loop.call_later(LINGER_S, self.transport.abort)
