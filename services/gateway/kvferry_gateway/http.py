"""uvicorn's HTTP/1.1 protocol, with the socket handed to the route.

A route finds a `TransportConnection` in `scope["extensions"]`: after the head of the response has been sent
the ordinary way, it writes the body straight to the transport, and ends it the ordinary way.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kvferry_gateway.connection import EXTENSION, TransportConnection
from kvferry_gateway.errors import ApiError, bad_request

MAX_HEAD_BYTES: Final = 64 << 10  # request line and headers
MAX_DISCARDED_BYTES: Final = 16 << 20  # of a body that goes on after its answer; then the connection is closed


class GatewayProtocol(HttpToolsProtocol):
    """One client connection."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._client = TransportConnection(transport)
        self._head_bytes = 0  # of a head that is not complete yet
        self._discarded_bytes = 0  # of the body under way, since its answer is out
        sock = transport.get_extra_info("socket")
        if sock is not None:
            # The loops do so, too; an event that waits for the one before to be acknowledged costs 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
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
            # Read on for a while: to close at once would reset the connection before the client has read why.
            self._discarded_bytes += len(body)
            if self._discarded_bytes > MAX_DISCARDED_BYTES:
                self.transport.abort()

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(bad_request(msg, code="invalid_http"))

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._client.note_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.note_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client.note_resumed()

    def _refuse(self, error: ApiError) -> None:
        """Answer what is no request, and close."""
        if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
            self.transport.abort()  # another answer is under way: this one would be read as a part of it
            return
        reason: Any = {431: "Request Header Fields Too Large"}.get(error.status, "Bad Request")
        body = error.body
        self.transport.write(
            f"HTTP/1.1 {error.status} {reason}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode()
            + body
        )
        self.transport.close()
