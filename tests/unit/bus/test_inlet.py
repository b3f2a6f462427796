"""The queue between the bus and one handler."""

from __future__ import annotations

import asyncio

import structlog

from kvferry.bus.base import BusCounters, BusMessage
from kvferry.bus.inlet import MAX_CALLS_PER_TURN, MAX_PENDING_BYTES, Inlet


class Message(BusMessage):
    def __init__(self, payload: bytes) -> None:
        self.subject = "s"
        self.payload = payload

    async def respond(self, payload: bytes) -> None:
        raise AssertionError("nobody responds here")


def made(handled: list[bytes], max_pending: int = 1 << 16) -> tuple[Inlet, BusCounters]:
    counters = BusCounters()
    log = structlog.get_logger()
    return Inlet(lambda message: handled.append(message.payload), counters, log, max_pending), counters


async def test_a_burst_lets_other_work_run_between() -> None:
    handled: list[bytes] = []
    seen_by_others: list[int] = []
    inlet, _ = made(handled)
    for _ in range(3 * MAX_CALLS_PER_TURN):
        inlet.put(Message(b""))
    for _ in range(4):
        await asyncio.sleep(0)
        seen_by_others.append(len(handled))
    assert seen_by_others == [MAX_CALLS_PER_TURN * turn for turn in (1, 2, 3, 3)]


async def test_its_bytes_are_bounded_but_one_message_always_fits() -> None:
    handled: list[bytes] = []
    inlet, counters = made(handled)
    inlet.put(Message(bytes(MAX_PENDING_BYTES + 1)))
    inlet.put(Message(b"dropped"))
    assert counters.dropped == 1
    await asyncio.sleep(0)
    inlet.put(Message(b"taken"))
    await asyncio.sleep(0)
    assert [len(payload) for payload in handled] == [MAX_PENDING_BYTES + 1, len(b"taken")]


async def test_an_overfull_episode_is_logged_once() -> None:
    inlet, counters = made([], max_pending=2)
    with structlog.testing.capture_logs() as logs:
        inlet._log = structlog.get_logger()
        for _ in range(2):
            for _ in range(10):
                inlet.put(Message(b"secret"))
            await asyncio.sleep(0)
    assert counters.dropped == 16
    assert [entry["log_level"] for entry in logs] == ["warning", "warning"]
    assert "secret" not in str(logs)
