"""One HTTP exchange in ASGI's terms: who asks, the client's end, and whole answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from kvferry.runtime import now
from kvferry.trace.open_span import OpenSpan
from kvferry_gateway.http.connection import EXTENSION, AsgiConnection, ClientConnection, Receive, Send
from kvferry_gateway.http.rate_limit import NO_LIMITS, Allowance

Scope = dict[str, Any]
Header = tuple[bytes, bytes]
UNLIMITED: Final = Allowance(NO_LIMITS)


@dataclass(frozen=True, slots=True)
class Caller:
    """What the request's head says about who asks."""

    request_id: str  # a label, at most MAX_NAME_CHARS
    salt: bytes  # root of the prefix cache
    labels: list[Header]  # that every answer gets
    allowance: Allowance = UNLIMITED
    span: OpenSpan | None = None  # of the request; None: nobody records its trace

    @property
    def headers(self) -> list[Header]:
        """Those of an answer that begins now."""
        return [*self.labels, *self.allowance.headers(now())]


@dataclass(slots=True)
class Exchange:
    """One request and the means to answer it."""

    scope: Scope
    receive: Receive
    send: Send
    caller: Caller

    async def json(self, value: Any, status: int = 200) -> None:
        await respond(self.send, status, json.dumps(value, separators=(",", ":")).encode(), self.caller.headers)


def connection_of(scope: Scope, receive: Receive, send: Send) -> ClientConnection:
    """The socket itself where our HTTP protocol class gave it, and chunked encoding is understood."""
    direct = scope.get("extensions", {}).get(EXTENSION)
    if isinstance(direct, ClientConnection) and scope["http_version"] == "1.1":
        return direct
    return AsgiConnection(receive, send)


EVENT_STREAM: Final[tuple[Header, ...]] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep the events back
    (b"transfer-encoding", b"chunked"),
)


async def respond(
    send: Send, status: int, body: bytes, headers: list[Header], kind: bytes = b"application/json"
) -> None:
    """A whole answer."""
    head = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
