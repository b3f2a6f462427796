"""The virtual-time loop that simulations run on."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from virtual_loop import Deadlock, EventLog, VirtualTimeout, run_virtual

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import Faults, MemoryBroker, MemoryBus
from kvferry.errors import BusError
from kvferry.runtime import SeededRuntime


def test_an_hour_passes_at_once_and_exactly() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> float:
        await asyncio.sleep(3599.5)
        return asyncio.get_running_loop().time()

    began = time.monotonic()
    run = run_virtual(scenario, 0)
    assert run.result == run.seconds == 3599.5
    assert time.monotonic() - began < 1.0


def test_timers_fire_in_order_of_their_time_with_the_clock_at_it() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> list[tuple[float, float]]:
        loop = asyncio.get_running_loop()
        fired: list[tuple[float, float]] = []

        async def wait(seconds: float) -> None:
            await asyncio.sleep(seconds)
            fired.append((seconds, loop.time()))

        await asyncio.gather(*(wait(seconds) for seconds in (0.3, 0.1, 1e-6, 0.2)))
        return fired

    fired = run_virtual(scenario, 0).result
    assert [seconds for seconds, _ in fired] == [1e-6, 0.1, 0.2, 0.3]
    assert all(at == pytest.approx(seconds, abs=1e-8) for seconds, at in fired)


def test_waiting_for_what_never_comes_is_a_deadlock_and_says_when() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        await asyncio.sleep(2.5)
        await asyncio.Event().wait()

    with pytest.raises(Deadlock, match=r"2\.5"):
        run_virtual(scenario, 0)


def test_timers_that_only_set_each_other_run_into_the_limit() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        while True:
            await asyncio.sleep(0.25)

    with pytest.raises(VirtualTimeout):
        run_virtual(scenario, 0, limit=100.0)


def test_what_the_scenario_raises_comes_out_and_its_other_tasks_are_cancelled() -> None:
    ended: list[str] = []

    async def forever() -> None:
        try:
            await asyncio.sleep(1e6)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        task = asyncio.ensure_future(forever())
        await asyncio.sleep(1)
        assert not task.done()
        raise KeyError("scenario")

    with pytest.raises(KeyError, match="scenario"):
        run_virtual(scenario, 0)
    assert ended == ["cancelled"]


def test_threads_and_sockets_are_refused() -> None:
    async def thread(runtime: SeededRuntime, log: EventLog) -> None:
        await asyncio.get_running_loop().run_in_executor(None, print)

    async def sockets(runtime: SeededRuntime, log: EventLog) -> None:
        await asyncio.open_connection("127.0.0.1", 1)

    with pytest.raises(RuntimeError, match="thread"):
        run_virtual(thread, 0)
    with pytest.raises((NotImplementedError, RuntimeError)):
        run_virtual(sockets, 0)


async def gossip(runtime: SeededRuntime, log: EventLog) -> None:
    """Five clients publish on a bad network, while the server restarts and one of them is cut off."""
    broker = MemoryBroker(
        runtime, faults=Faults(loss=0.05, duplication=0.05, reordering=0.2, min_delay=0.001, max_delay=0.05)
    )
    buses: list[MemoryBus] = []
    for number in range(5):
        bus = MemoryBus(broker, BusSettings("memory://", f"c{number}", f"inbox.c{number}"), runtime)
        await bus.start()
        bus.on_change(lambda up, number=number: log.record("change", number, up))
        await bus.subscribe("gossip.*", lambda m, number=number: log.record("heard", number, m.subject, m.payload))
        buses.append(bus)

    async def talk(number: int) -> None:
        for turn in range(40):
            try:
                await buses[number].publish(f"gossip.{number}", bytes([turn]))
            except BusError as error:
                log.record("failed", number, turn, type(error).__name__)
            await asyncio.sleep(0.2 * runtime.uniform())

    async def disturb() -> None:
        await asyncio.sleep(1.0)
        broker.cut(buses[3])
        await asyncio.sleep(0.5)
        broker.stop()
        await asyncio.sleep(0.5)
        broker.restart()
        broker.heal(buses[3])

    await asyncio.gather(disturb(), *(talk(number) for number in range(5)))
    await asyncio.sleep(5)
    for bus in buses:
        await bus.close()


def test_a_seed_run_in_two_processes_with_different_hash_seeds_gives_the_same_event_log() -> None:
    def digest(hash_seed: str, seed: str) -> str:
        here = Path(__file__).resolve()
        environment = os.environ | {
            "PYTHONHASHSEED": hash_seed,
            "PYTHONPATH": os.pathsep.join([str(here.parent), str(here.parents[1])]),
        }
        program = f"import test_virtual_loop as t; print(t.run_virtual(t.gossip, {seed}).log.digest)"
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        return run.stdout.strip().splitlines()[-1]

    assert digest("1", "42") == digest("2", "42")
    assert digest("1", "43") != digest("1", "42"), "the seed matters, so that equality says something"


def test_the_gossip_has_in_it_what_could_differ() -> None:
    events = run_virtual(gossip, 42).log.events
    kinds = [fields[0] for _, fields in events]
    assert kinds.count("heard") > 200
    assert kinds.count("failed") > 0
    assert ("change", 3, False) in [fields for _, fields in events]


def test_the_log_hash_covers_order_time_and_fields() -> None:
    def digest(*events: tuple[float, str]) -> str:
        clock = iter([at for at, _ in events])
        log = EventLog(lambda: next(clock))
        for _, what in events:
            log.record(what)
        return log.digest

    base = digest((0.0, "a"), (1.0, "b"))
    assert digest((0.0, "a"), (1.0, "b")) == base
    assert (
        len({base, digest((1.0, "b"), (0.0, "a")), digest((0.0, "a"), (1.5, "b")), digest((0.0, "a"), (1.0, "c"))}) == 4
    )
