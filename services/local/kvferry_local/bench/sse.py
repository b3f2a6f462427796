"""The answers of an HTTP/1.1 server as they arrive. Small, so that a load's client is no bottleneck."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from kvferry.runtime import blocking_clock

Headers = dict[str, str]
READ_BYTES = 1 << 16


async def read_head(reader: asyncio.StreamReader) -> tuple[int, Headers]:
    """Status and headers, by lower-case name. Raises asyncio.IncompleteReadError, ValueError."""
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip().lower()
    return int(lines[0].split(" ", 2)[1]), headers


async def body_pieces(reader: asyncio.StreamReader, headers: Headers) -> AsyncIterator[bytes]:
    """The body as it arrives: chunked, by length, or up to the end of the connection."""
    if "chunked" in headers.get("transfer-encoding", ""):
        # readuntil, for a connection that breaks between two chunks is no end of the body
        while size := int((await reader.readuntil(b"\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while piece := await reader.read(READ_BYTES):
            yield piece


async def read_body(reader: asyncio.StreamReader, headers: Headers) -> bytes:
    """All of it."""
    return b"".join([piece async for piece in body_pieces(reader, headers)])


async def data_events(reader: asyncio.StreamReader, headers: Headers) -> AsyncIterator[tuple[float, bytes]]:
    """(arrival, payload) of each `data:` line; comments and empty lines are skipped."""
    rest = b""
    async for piece in body_pieces(reader, headers):
        moment = blocking_clock()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield moment, line[5:].strip()
