"""The in-memory broker's faults: they happen, they are counted, and one seed decides them."""

from __future__ import annotations

import asyncio

import pytest
from bus_probes import Collector, Responder
from virtual_loop import EventLog, VirtualRun, run_virtual

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import Faults, MemoryBroker, MemoryBus
from kvferry.errors import BusTimeout, BusUnavailable
from kvferry.runtime import SeededRuntime

COUNT = 1000
SENT = [value.to_bytes(4, "little") for value in range(COUNT)]


async def client(broker: MemoryBroker, name: str, runtime: SeededRuntime) -> MemoryBus:
    bus = MemoryBus(broker, BusSettings("memory://", name, f"inbox.{name}"), runtime)
    await bus.start()
    return bus


def stream(faults: Faults, seed: int = 1) -> tuple[list[bytes], MemoryBroker, VirtualRun[None]]:
    """What arrives of `SENT`, one message every millisecond."""
    arrived = Collector()
    brokers: list[MemoryBroker] = []

    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        broker = MemoryBroker(runtime, faults=faults)
        brokers.append(broker)
        publisher, subscriber = await client(broker, "p", runtime), await client(broker, "s", runtime)
        await subscriber.subscribe("numbers", arrived)
        for payload in SENT:
            await publisher.publish("numbers", payload)
            await asyncio.sleep(0.001)
        await asyncio.sleep(10)
        for payload in arrived.payloads:
            log.record(payload)

    run = run_virtual(scenario, seed)
    return arrived.payloads, brokers[0], run


def test_without_faults_all_arrive_once_in_order() -> None:
    arrived, broker, _ = stream(Faults())
    assert arrived == SENT
    assert (broker.counters.lost, broker.counters.duplicated, broker.counters.reordered) == (0, 0, 0)


def test_loss_happens_and_is_counted() -> None:
    arrived, broker, _ = stream(Faults(loss=0.1))
    assert broker.counters.lost == COUNT - len(arrived) > 50
    assert arrived == sorted(arrived, key=SENT.index)


def test_duplication_happens_and_is_counted() -> None:
    arrived, broker, _ = stream(Faults(duplication=0.1))
    assert broker.counters.duplicated == len(arrived) - COUNT > 50
    assert sorted(set(arrived), key=SENT.index) == SENT


def test_reordering_happens_is_counted_and_loses_nothing() -> None:
    arrived, broker, _ = stream(Faults(reordering=0.1))
    assert arrived != SENT
    assert sorted(arrived) == sorted(SENT)
    overtaken = [
        payload
        for place, payload in enumerate(arrived)
        if any(SENT.index(before) > SENT.index(payload) for before in arrived[max(0, place - 60) : place])
    ]
    assert broker.counters.reordered == len(overtaken) > 50


def test_delay_alone_keeps_the_order() -> None:
    arrived, broker, _ = stream(Faults(min_delay=0.01, max_delay=0.2))
    assert arrived == SENT
    assert broker.counters.reordered == 0


def test_faults_hit_only_what_they_apply_to() -> None:
    arrived, _, _ = stream(Faults(loss=1.0, applies=lambda subject, payload: payload[0] % 2 == 1))
    assert arrived == [payload for payload in SENT if payload[0] % 2 == 0]


def test_one_seed_gives_one_history_and_another_seed_another() -> None:
    faults = Faults(loss=0.1, duplication=0.1, reordering=0.2, min_delay=0.001, max_delay=0.01)
    first, again, other = (stream(faults, seed)[2].log.digest for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_a_lost_answer_is_a_timeout_at_the_asker() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> float:
        broker = MemoryBroker(runtime, faults=Faults(loss=1.0, applies=lambda subject, _: subject.startswith("inbox.")))
        bus = await client(broker, "a", runtime)
        responder = Responder()
        await bus.subscribe("echo", responder)
        with pytest.raises(BusTimeout):
            await bus.request("echo", b"x", timeout=0.3)
        assert responder.asked.payloads == [b"x"]
        return asyncio.get_running_loop().time()

    assert run_virtual(scenario, 1).result == pytest.approx(0.3)


def test_one_client_can_be_cut_off_and_comes_back_within_the_longest_wait() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        broker = MemoryBroker(runtime)
        cut, other = await client(broker, "cut", runtime), await client(broker, "other", runtime)
        collector = Collector()
        await cut.subscribe("news", collector)
        broker.cut(cut)
        assert (cut.connected, other.connected) == (False, True)
        with pytest.raises(BusUnavailable):
            await cut.publish("news", b"x")
        await other.publish("news", b"missed")
        await asyncio.sleep(60)
        assert not cut.connected
        broker.heal(cut)
        await asyncio.sleep(1.0)
        assert cut.connected
        await other.publish("news", b"heard")
        assert await collector.until(1) == [b"heard"]

    run_virtual(scenario, 1)


def test_what_is_on_its_way_when_the_server_stops_is_lost() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> list[bytes]:
        broker = MemoryBroker(runtime, faults=Faults(min_delay=0.5, max_delay=0.5))
        bus = await client(broker, "a", runtime)
        collector = Collector()
        await bus.subscribe("news", collector)
        await bus.publish("news", b"on its way")
        broker.stop()
        broker.restart()
        await asyncio.sleep(5)
        await bus.publish("news", b"after")
        return await collector.until(1)

    assert run_virtual(scenario, 1).result == [b"after"]
