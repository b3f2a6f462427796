"""The faults that a memory network can be told to make, on a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from virtual_loop import VirtualLoop

from kvferry.errors import ConnectionClosed, CorruptFrame
from kvferry.runtime import SeededRuntime
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.link import FLUSH_SECONDS
from kvferry.transport.memory import MemoryNetwork, MemoryTransport


class Two:
    """Two processes, `p` and `d`, and d's connection to p."""

    def __init__(self) -> None:
        self.network = MemoryNetwork()
        self.accepted: list[Connection] = []

    async def start(self) -> None:
        runtime = SeededRuntime(1)
        self.p, self.d = (
            MemoryTransport(TransportSettings(incarnation, b"key"), runtime, self.network, name)
            for incarnation, name in ((1, "p"), (2, "d"))
        )
        await self.p.start(self.accepted.append)
        await self.d.start(self.accepted.append)
        self.near = await self.d.connect("memory://p", 1.0)
        await asyncio.sleep(0.01)
        (self.far,) = self.accepted


@pytest.fixture
def simulate() -> Callable[[Callable[[Two], Awaitable[None]]], None]:
    def run(scenario: Callable[[Two], Awaitable[None]]) -> None:
        async def main() -> None:
            two = Two()
            await two.start()
            await scenario(two)

        with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit=60.0)) as runner:
            runner.run(main())

    return run


Simulate = Callable[[Callable[[Two], Awaitable[None]]], None]


def flip(frame: bytearray) -> None:
    frame[3] ^= 1


def test_a_spoilt_frame_arrives_changed_and_only_that_one(simulate: Simulate) -> None:
    async def scenario(two: Two) -> None:
        two.network.spoil_next_frame(flip)
        for tag, expected in ((1, b"abce"), (2, b"abcd")):
            buffer = bytearray(4)
            received = two.near.receive(tag, memoryview(buffer))
            two.far.send(tag, memoryview(b"abcd"))
            assert await received == 4
            assert buffer == expected

    simulate(scenario)


def test_a_frame_can_be_made_short_or_long(simulate: Simulate) -> None:
    async def scenario(two: Two) -> None:
        two.network.spoil_next_frame(lambda frame: frame.__delitem__(slice(2, None)))
        two.network.spoil_next_frame(lambda frame: frame.extend(b"more"))
        short, long = (two.near.receive(tag, memoryview(bytearray(4))) for tag in (1, 2))
        two.far.send(1, memoryview(b"abcd"))
        two.far.send(2, memoryview(b"abcd"))
        assert await short == 2
        with pytest.raises(CorruptFrame):
            await long
        assert not two.near.closed

    simulate(scenario)


def test_delay_holds_messages_back_and_keeps_their_order(simulate: Simulate) -> None:
    async def scenario(two: Two) -> None:
        loop = asyncio.get_running_loop()
        delays = iter([3.0, 1.0, 2.0])
        two.network.delay = lambda: next(delays)
        heard: list[tuple[float, bytes]] = []
        start = loop.time()
        two.far.on_message(lambda message: heard.append((loop.time() - start, bytes(message))))
        for message in (b"a", b"b", b"c"):
            two.near.send_message(message)
        await asyncio.sleep(10)
        assert [message for _, message in heard] == [b"a", b"b", b"c"]
        assert [when for when, _ in heard] == pytest.approx([3.0, 4.0, 6.0])

    simulate(scenario)


def test_a_frozen_process_hears_nothing_until_it_is_thawed(simulate: Simulate) -> None:
    async def scenario(two: Two) -> None:
        heard: list[bytes] = []
        two.far.on_message(lambda message: heard.append(bytes(message)))
        two.network.freeze("p")
        two.near.send_message(b"are you there?")
        await asyncio.sleep(5)
        assert heard == []
        assert not two.near.closed
        with pytest.raises(TimeoutError):
            await two.d.connect("memory://p", 1.0)
        two.network.thaw("p")
        await asyncio.sleep(1)
        assert heard == [b"are you there?"]

    simulate(scenario)


def test_closing_towards_a_frozen_process_takes_a_second_and_frees_the_buffers(simulate: Simulate) -> None:
    async def scenario(two: Two) -> None:
        loop = asyncio.get_running_loop()
        two.network.freeze("p")
        received = two.near.receive(1, memoryview(bytearray(4)))
        start = loop.time()
        await two.near.close()
        assert loop.time() - start == pytest.approx(FLUSH_SECONDS)
        assert isinstance(received.exception(), ConnectionClosed)

    simulate(scenario)


@pytest.mark.parametrize("fault", ["cut", "kill"])
def test_a_cut_ends_both_sides_at_once(simulate: Simulate, fault: str) -> None:
    async def scenario(two: Two) -> None:
        ends: list[str] = []
        two.near.on_closed(lambda: ends.append("near"))
        two.far.on_closed(lambda: ends.append("far"))
        received = two.near.receive(1, memoryview(bytearray(4)))
        sent = two.near.send(2, memoryview(b"lost"))
        if fault == "cut":
            two.network.cut("d", "p")
        else:
            two.network.kill("p")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert sorted(ends) == ["far", "near"]
        assert isinstance(received.exception(), ConnectionClosed)
        assert isinstance(sent.exception(), ConnectionClosed)
        if fault == "cut":
            assert not (await two.d.connect("memory://p", 1.0)).closed
        else:
            with pytest.raises(ConnectionClosed):
                await two.d.connect("memory://p", 1.0)

    simulate(scenario)
