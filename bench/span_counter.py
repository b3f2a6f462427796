"""A collector that counts: takes spans by OTLP over HTTP, answers at once, and decodes them only when it is asked.

python -m bench.span_counter     prints its port as a JSON line; a line on stdin is answered by {"spans": …, "bytes": …}
"""

from __future__ import annotations

import asyncio
from typing import Final

import uvloop
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bench.command_lines import commands, tell

TAKEN: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"
MAX_LINE_BYTES: Final = 1 << 16


async def serve() -> None:
    bodies: list[bytes] = []

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                writer.write(TAKEN)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0, limit=MAX_LINE_BYTES)
    tell(port=server.sockets[0].getsockname()[1])
    async for _ in commands():
        tell(spans=sum(map(_num_spans, bodies)), bytes=sum(map(len, bodies)))


def _num_spans(body: bytes) -> int:
    request = ExportTraceServiceRequest.FromString(body)
    return sum(len(scope.spans) for resource in request.resource_spans for scope in resource.scope_spans)


if __name__ == "__main__":
    uvloop.run(serve())
