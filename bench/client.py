"""A small streaming client that notes when each token's event arrived. One connection per request."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from kvferry.runtime import blocking_clock
from kvferry_local.bench.sse import data_events, read_body, read_head

MAX_LINE_BYTES: Final = 1 << 22
JSON_TYPE: Final = "content-type: application/json"


class RequestError(Exception):
    """The server answered with an error, or ended the stream with one."""


class Refused(RequestError):
    """The server answered with a status other than 200: the stream never began."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"HTTP {status} {body}")
        self.status = status


@dataclass(slots=True)
class Stream:
    """What came back. Times are seconds of one monotonic clock."""

    sent: float
    arrivals: list[float] = field(default_factory=list)  # of each event with text
    text: str = ""
    token_ids: list[int] = field(default_factory=list)  # where the request asked for them
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    ended: float = 0.0
    connection: asyncio.StreamWriter | None = None

    def reset(self) -> None:
        """End the connection as a client that crashed does: by a TCP reset, not by an orderly end."""
        if self.connection is not None:
            sock: socket.socket = self.connection.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.transport.abort()

    def gaps(self, start: float, end: float) -> list[tuple[float, float]]:
        """(arrival, seconds since the arrival before) of events with both ends inside [start, end]."""
        pairs = zip(self.arrivals, self.arrivals[1:], strict=False)
        return [(later, later - earlier) for earlier, later in pairs if earlier >= start and later <= end]


async def request_json(host: str, port: int, path: str, timeout: float = 10.0) -> Any:
    """GET a JSON document. Raises `RequestError` or OSError."""
    return json.loads(await request_bytes(host, port, path, timeout))


async def request_bytes(host: str, port: int, path: str, timeout: float = 10.0) -> bytes:
    """GET a document. Raises `RequestError` for anything but 200, or OSError."""
    async with asyncio.timeout(timeout):
        reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n\r\n".encode())
            status, headers = await read_head(reader)
            body = await read_body(reader, headers)
        finally:
            writer.close()
    if status != 200:
        raise RequestError(f"GET {path}: HTTP {status} {body[:200]!r}")
    return body


async def stream(
    host: str,
    port: int,
    path: str,
    body: dict[str, Any],
    *,
    request_id: str = "",
    into: Stream | None = None,
    on_token: Callable[[], None] | None = None,
) -> Stream:
    """POST a streaming request and read it to `[DONE]`.

    `into` is filled while tokens arrive, so that what came is known even if the caller cancels.
    Raises `RequestError`, OSError or asyncio.IncompleteReadError.
    """
    document = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    label = f"x-request-id: {request_id}\r\n" if request_id else ""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\n{JSON_TYPE}\r\n{label}"
        f"Connection: close\r\nContent-Length: {len(document)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
    result = into if into is not None else Stream(0.0)
    result.sent = blocking_clock()
    result.connection = writer
    try:
        writer.write(head.encode() + document)
        status, headers = await read_head(reader)
        if status != 200:
            refusal = await read_body(reader, headers)
            raise Refused(status, refusal[:300].decode(errors="replace"))
        done = False
        async for moment, event in data_events(reader, headers):
            if event == b"[DONE]":
                done = True
            else:
                _take(result, moment, json.loads(event), on_token)
        if not done:
            raise RequestError("the stream ended without [DONE]")
    finally:
        result.ended = blocking_clock()
        writer.close()
    return result


def _take(result: Stream, moment: float, event: dict[str, Any], on_token: Callable[[], None] | None) -> None:
    if error := event.get("error"):
        raise RequestError(str(error))
    result.usage = event.get("usage") or result.usage
    for choice in event.get("choices") or []:
        result.token_ids += choice.get("token_ids") or []
        if text := choice.get("text") or (choice.get("delta") or {}).get("content"):
            result.arrivals.append(moment)
            result.text += text
            if on_token is not None:
                on_token()
        result.finish_reason = choice.get("finish_reason") or result.finish_reason
