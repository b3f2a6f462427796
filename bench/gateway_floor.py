"""The least that a gateway can cost: a loop that writes ready bytes to open connections and does nothing else.

python -m bench.gateway_floor     prints its port as a JSON line; commands on stdin, a JSON line each

    {"rate": 50, "writes": 500, "bytes": 230}    that many writes to each connection that has asked, so many times a
                                                 second, each of so many bytes and in chunked encoding; answered by {}
"""

from __future__ import annotations

import asyncio
from typing import Final

import uvloop

from bench.command_lines import commands, tell

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST: Final = b'data: {"choices":[{"delta":{"content":" "}}]}\n\n'
LAST: Final = b"data: [DONE]\n\n"


class Connection(asyncio.Protocol):
    """Answers whatever is asked with the head and one token, and waits to be written to."""

    def __init__(self, asked: dict[asyncio.Transport, None]) -> None:
        self._asked = asked  # those of all connections, in the order of asking

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # a TCP connection has no other
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if self._transport not in self._asked:
            self._asked[self._transport] = None
            self._transport.write(HEAD + _chunk(FIRST))

    def connection_lost(self, exc: Exception | None) -> None:
        self._asked.pop(self._transport, None)


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


async def write(asked: dict[asyncio.Transport, None], rate: float, writes: int, num_bytes: int) -> None:
    """Each write is one event of `num_bytes`."""
    loop = asyncio.get_running_loop()
    event = b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n'
    chunk = _chunk(event % (b"x" * max(1, num_bytes - len(event) + 2)))
    due = loop.time()
    for _ in range(writes):
        for transport in asked:
            transport.write(chunk)
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - loop.time()))
    for transport in asked:
        transport.write(_chunk(LAST) + b"0\r\n\r\n")
    asked.clear()


async def serve() -> None:
    asked: dict[asyncio.Transport, None] = {}
    server = await asyncio.get_running_loop().create_server(lambda: Connection(asked), "127.0.0.1", 0)
    tell(port=server.sockets[0].getsockname()[1])
    async for command in commands():
        await write(asked, command["rate"], command["writes"], command["bytes"])
        tell()


if __name__ == "__main__":
    uvloop.run(serve())
