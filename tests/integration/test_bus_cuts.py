"""A connection to a real nats-server that is cut anywhere in its opening: the bus comes back, on both event loops."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest
import uvloop
from bus_probes import PATIENCE, Changes, Collector
from nats_server import running_nats

from kvferry.bus.nats import NatsBus
from kvferry.errors import BusUnavailable
from kvferry.runtime import Runtime, SystemRuntime

CUTS = range(0, 700, 35)  # bytes; the server's greeting, its PONG and the first echo end before the last of them
BEAT_S = 0.005


class Impatient(SystemRuntime):
    """Always draws the shortest wait before a reconnect."""

    def uniform(self) -> float:
        return 0.0


class Cutter:
    """A relay to the server that ends a connection once so many bytes have come from there. `None`: it never does."""

    def __init__(self, url: str) -> None:
        self.cuts: list[int] = []  # of the connections to come, one each
        self.num_connections = 0
        self._server = urlsplit(url)
        self._open: set[asyncio.StreamWriter] = set()

    def sever(self) -> None:
        """What is connected now."""
        for writer in self._open:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        left = self.cuts.pop(0) if self.cuts else None
        from_server, to_server = await asyncio.open_connection(self._server.hostname, self._server.port)
        self._open.add(writer)
        upwards = asyncio.ensure_future(_pump(reader, to_server, None))
        await _pump(from_server, writer, left)
        self._open.discard(writer)
        to_server.close()
        await upwards


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, left: int | None) -> None:
    with contextlib.suppress(OSError, RuntimeError):
        while left != 0 and (some := await source.read(1 << 16)):
            some = some[:left]
            sink.write(some)
            await sink.drain()
            left = None if left is None else left - len(some)
    sink.close()


@asynccontextmanager
async def behind_a_cutter() -> AsyncIterator[tuple[Cutter, Callable[[Runtime], NatsBus]]]:
    async with running_nats() as server:
        cutter = Cutter(server.embedded.url)
        relay = await asyncio.start_server(cutter.serve, "127.0.0.1", 0)
        url = f"nats://127.0.0.1:{relay.sockets[0].getsockname()[1]}"
        try:
            yield cutter, lambda runtime: NatsBus(server.settings("cut", url=url), runtime)
        finally:
            relay.close()
            await relay.wait_closed()


async def comes_back_after_every_cut() -> None:
    async with behind_a_cutter() as (cutter, make_bus):
        bus = make_bus(Impatient())
        await bus.start()
        beats = asyncio.create_task(beat(bus))
        try:
            inboxes = [Collector() for _ in range(3)]
            for number, inbox in enumerate(inboxes):
                await bus.subscribe(f"inbox.{number}", inbox)
            changes = Changes(bus)
            for cut in CUTS:
                cutter.cuts, before = [cut], cutter.num_connections
                cutter.sever()
                await changes.until(False)
                async with asyncio.timeout(PATIENCE):
                    while cutter.num_connections < before + 2:  # the one that is cut, and one that is not
                        await asyncio.sleep(BEAT_S)
                await changes.until(True)
            for number, inbox in enumerate(inboxes):
                await bus.publish(f"inbox.{number}", b"still here")
                assert await inbox.until(1) == [b"still here"]
            assert not beats.done()
        finally:
            beats.cancel()
            await bus.close()


async def beat(bus: NatsBus) -> None:
    """Something is always being sent; the only error of it is the one that senders expect."""
    while True:
        with contextlib.suppress(BusUnavailable):
            await bus.publish("beat", bytes(1000))
        await asyncio.sleep(BEAT_S)


@pytest.mark.parametrize("make_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_a_bus_comes_back_wherever_its_connection_is_cut(make_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(comes_back_after_every_cut())
