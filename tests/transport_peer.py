"""A process at the other end of a data-plane connection, told by flow messages what to do.

    python transport_peer.py ucx|tcp [PORT] [--careless]

It prints its address, serves until SIGTERM, and answers every message:
    post TAG SIZE         posts a receive, answers `posted TAG`
    send TAG SIZE FILL    sends a frame of SIZE bytes FILL, answers `sent TAG` when the buffer is free again
    anything else         comes back as it is
`--careless`: ends by running off the end of the program, without closing the transport.
"""

from __future__ import annotations

import asyncio
import sys

import uvloop

from kvferry.runtime import SystemRuntime, stop_signals
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.factory import open_transport

DATA_KEY = b"the data key of the test cluster"


class Peer:
    """Answers one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._buffers: dict[int, bytearray] = {}
        connection.on_message(self._obey)

    def _obey(self, message: memoryview) -> None:
        verb, *numbers = bytes(message).split()
        if verb == b"post":
            tag, size = map(int, numbers)
            self._buffers[tag] = bytearray(size)
            self._connection.receive(tag, memoryview(self._buffers[tag]))
            self._connection.send_message(b"posted %d" % tag)
        elif verb == b"send":
            tag, size, fill = map(int, numbers)
            frame = bytes([fill]) * size
            sent = self._connection.send(tag, memoryview(frame))
            sent.add_done_callback(lambda _: self._connection.send_message(b"sent %d" % tag))
        else:
            self._connection.send_message(bytes(message))


async def main(kind: str, port: int, careless: bool) -> None:
    settings = TransportSettings(incarnation=7, data_key=DATA_KEY, port=port)
    transport = open_transport(kind, settings, SystemRuntime())
    peers: list[Peer] = []
    with stop_signals(asyncio.get_running_loop()) as stop:
        await transport.start(lambda connection: peers.append(Peer(connection)))
        print(transport.address, flush=True)
        await stop.wait()
        if not careless:
            await transport.close()


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--careless"]
    uvloop.run(main(arguments[0], int(arguments[1]) if len(arguments) > 1 else 0, "--careless" in sys.argv))
