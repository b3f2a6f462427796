"""Turns that are due, that are taken along, and that are late."""

from __future__ import annotations

import asyncio

from virtual_loop import EventLog, run_virtual

from kvferry.rhythm import EARLY, Rhythm
from kvferry.runtime import SeededRuntime

INTERVAL = 10.0


def _turns(rides: list[float], count: int = 4, work: float = 0.0) -> list[float]:
    """When the first `count` turns came, with somebody awake at each of `rides` and turns that take `work` seconds."""

    async def scenario(runtime: SeededRuntime, log: EventLog) -> list[float]:
        loop = asyncio.get_running_loop()
        rhythm = Rhythm(INTERVAL)
        for moment in rides:
            loop.call_at(moment, rhythm.ride)
        taken = []
        for _ in range(count):
            await rhythm.turn()
            taken.append(loop.time())
            await asyncio.sleep(work)
        return taken

    return run_virtual(scenario, 0).result


def test_a_turn_comes_when_it_is_due() -> None:
    assert _turns([]) == [10.0, 20.0, 30.0, 40.0]


def test_who_is_awake_shortly_before_takes_it_along_and_the_next_is_due_as_ever() -> None:
    early = EARLY * INTERVAL
    assert _turns([10 - early, 25.0, 29.0, 29.5]) == [10 - early, 20.0, 29.0, 40.0]


def test_what_is_late_is_not_made_up_for() -> None:
    assert _turns([], work=25.0) == [10.0, 35.0, 60.0, 85.0]


def test_nobody_takes_a_turn_along_that_is_under_way() -> None:
    assert _turns([9.0, 9.1, 9.2], work=5.0) == [9.0, 20.0, 30.0, 40.0]


def test_a_cancelled_turn_leaves_nothing_behind() -> None:
    async def scenario(runtime: SeededRuntime, log: EventLog) -> None:
        rhythm = Rhythm(INTERVAL)
        task = asyncio.create_task(rhythm.turn())
        await asyncio.sleep(1.0)
        task.cancel()
        await asyncio.wait((task,))
        await asyncio.sleep(INTERVAL)
        rhythm.ride()

    run_virtual(scenario, 0)
