"""The gateway's HTTP/1.1 protocol: bounded as `kvferry.http_port` has it, with the socket handed to the route.

A route finds a `TransportConnection` in `scope["extensions"]`: after the head of the response has been sent
the ordinary way, it writes the body straight to the transport, and ends it the ordinary way.
"""

from __future__ import annotations

import asyncio

from kvferry.http_port import BoundedProtocol
from kvferry_gateway.errors import ApiError
from kvferry_gateway.http.connection import EXTENSION, TransportConnection

CODES = {400: "invalid_http", 408: "request_timeout"}


class GatewayProtocol(BoundedProtocol):
    """One client connection."""

    def refusal(self, status: int, problem: str) -> bytes:
        return ApiError(status, problem, code=CODES.get(status)).body

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a TCP connection has no other
        super().connection_made(transport)
        self._client = TransportConnection(transport)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self._client}  # type: ignore[dict-item]  # ASGI lets a server give anything

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._client.note_lost()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._client.note_paused()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._client.note_resumed()
