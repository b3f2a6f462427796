"""The two ends of a transfer: over one of kvferry's transports, and over bare sockets.

python -m bench.transport_ends ucx|tcp|sockets FRAMES     the receiving process; prints its address
"""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from typing import Final

import uvloop

from kvferry.runtime import SystemRuntime
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.factory import open_transport
from kvferry.transport.slots import SlotPool
from kvferry.wire.frame import HEADER_BYTES

FRAME_BYTES: Final = HEADER_BYTES + (4 << 20)
WINDOW: Final = 4  # frames under way
WARM_UP: Final = 20  # frames before the clock starts, as in ucx_perftest
_KEY: Final = b"key of the transport benchmark"


async def send_over_transport(kind: str, address: str, num_frames: int) -> float:
    """Bytes per second, from the first measured frame until the receiver says that it has all."""
    transport = open_transport(kind, TransportSettings(1, _KEY), SystemRuntime())
    await transport.start(lambda connection: connection.abort())
    connection = await transport.connect(address, 10.0)
    slots = SlotPool(WINDOW)
    credits_left, done = asyncio.Semaphore(0), asyncio.Event()

    def heard(message: memoryview) -> None:
        if bytes(message) == b"credit":
            credits_left.release()
        else:
            done.set()

    connection.on_message(heard)
    started = 0.0
    for tag in range(WARM_UP + num_frames):
        if tag == WARM_UP:
            started = time.perf_counter()
        await credits_left.acquire()
        slot = await slots.acquire("bench")
        slots.lend(slot, connection.send(tag, slot.view))
        slots.release(slot)
    await done.wait()
    elapsed = time.perf_counter() - started
    await transport.close()
    return num_frames * FRAME_BYTES / elapsed


async def receive_over_transport(kind: str, num_frames: int) -> None:
    transport = open_transport(kind, TransportSettings(2, _KEY), SystemRuntime())
    arrived: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
    await transport.start(arrived.set_result)
    print(transport.address, flush=True)
    connection = await arrived
    ended = asyncio.Event()
    connection.on_closed(ended.set)
    slots = SlotPool(WINDOW)

    async def one(tag: int) -> None:
        slot = await slots.acquire("bench")
        received = connection.receive(tag, slot.view)
        slots.lend(slot, received)
        connection.send_message(b"credit")
        assert await received == FRAME_BYTES
        slots.release(slot)

    # One task per place in the window, each receiving every WINDOW-th frame.
    async def lane(first: int) -> None:
        for tag in range(first, WARM_UP + num_frames, WINDOW):
            await one(tag)

    await asyncio.gather(*(lane(first) for first in range(WINDOW)))
    connection.send_message(b"done")
    await ended.wait()
    await transport.close()


async def send_over_socket(port: int, num_frames: int) -> float:
    """The least that asyncio must do: the same bytes, straight from and into the same kind of memory."""
    loop = asyncio.get_running_loop()
    frames = _frames()
    with socket.socket() as sock:
        sock.setblocking(False)
        await loop.sock_connect(sock, ("127.0.0.1", port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        started = 0.0
        for number in range(WARM_UP + num_frames):
            if number == WARM_UP:
                started = time.perf_counter()
            await loop.sock_sendall(sock, frames[number % WINDOW])
        await loop.sock_recv(sock, 1)
        return num_frames * FRAME_BYTES / (time.perf_counter() - started)


def _frames() -> list[memoryview]:
    pool = SlotPool(WINDOW)
    slots = [pool.try_acquire("bench") for _ in range(WINDOW)]
    return [slot.view for slot in slots if slot is not None]


async def receive_over_socket(num_frames: int) -> None:
    loop = asyncio.get_running_loop()
    frames = _frames()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        print(listener.getsockname()[1], flush=True)
        sock, _ = await loop.sock_accept(listener)
    with sock:
        sock.setblocking(False)
        for number in range(WARM_UP + num_frames):
            rest = frames[number % WINDOW]
            while rest:
                rest = rest[await loop.sock_recv_into(sock, rest) :]
        await loop.sock_sendall(sock, b"!")


if __name__ == "__main__":
    kind, count = sys.argv[1], int(sys.argv[2])
    uvloop.run(receive_over_socket(count) if kind == "sockets" else receive_over_transport(kind, count))
