"""A seed is a history: the same in every process, whatever Python's hashes are; another seed is another one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ProcessLoop, acting_as, run_as
from storm import code_digest, storm
from world import simulate

from kvferry.runtime import now

STORM = Path(__file__).with_name("storm.py")
HASH_SEEDS = ("1", "2", "3")
CODE = code_digest()  # when this process imported it


def digest(seed: int, hash_seed: str, *arguments: str) -> str:
    """The history that a process of its own makes from this seed."""
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(STORM.parent.parent)}
    command = [sys.executable, str(STORM), str(seed), *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    history, code = run.stdout.split()
    # Somebody who edits while the tests run would see a seed with two histories, and look for the cause in vain.
    assert code == CODE, "the code has changed since this run of the tests began: its histories cannot be compared"
    return history


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_of_faults_ends_with_every_stream_complete(seed: int) -> None:
    simulate(seed, storm(seed))


def test_one_seed_is_one_history_in_processes_with_different_hashes_and_another_seed_another() -> None:
    first, second, here = digest(1, HASH_SEEDS[0]), digest(1, HASH_SEEDS[1]), simulate(1, storm(1))
    assert len(here.events) > 1000
    assert first == second == here.digest
    assert digest(2, HASH_SEEDS[0]) != first


def test_a_choice_that_hangs_on_the_order_of_a_set_is_found() -> None:
    """Negative control of the test above."""
    assert len({digest(1, hash_seed, "unordered") for hash_seed in HASH_SEEDS}) > 1


def test_a_frozen_process_runs_nothing_and_then_first_what_waits_for_it() -> None:
    said: list[tuple[str, float]] = []

    async def ticking() -> None:
        while True:
            await asyncio.sleep(1.0)
            said.append(("tick", now()))

    async def hearing(queue: asyncio.Queue[str]) -> None:
        while True:
            said.append((await queue.get(), now()))

    async def body(loop: ProcessLoop) -> None:
        queue: asyncio.Queue[str] = asyncio.Queue()

        async def start() -> list[asyncio.Task[None]]:
            return [loop.create_task(ticking()), loop.create_task(hearing(queue))]

        tasks = await run_as("frozen", start())
        await asyncio.sleep(1.5)
        loop.freeze("frozen")
        with acting_as("sender"):
            queue.put_nowait("message")
        await asyncio.sleep(3.0)
        assert said == [("tick", 1.0)]
        loop.thaw("frozen")
        await asyncio.sleep(1.2)
        for task in tasks:
            task.cancel()

    loop = ProcessLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(body(loop))
    assert said == [("tick", 1.0), ("message", 4.5), ("tick", 4.5), ("tick", 5.5)]
