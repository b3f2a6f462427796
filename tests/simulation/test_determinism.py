"""A seed is a history: the same in every process, whatever Python's hashes are; another seed is another one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from plants import Edit, Plant, copied_tree, planted, simulation
from processes import MachineClock, ProcessLoop, acting_as, run_as
from seed import play

from kvferry.runtime import now

# Under these two the names of the gateways come out of a set in different orders.
HASH_SEEDS = ("1", "3")
NUM_REQUESTS = 12
UNORDERED = Plant(
    "a choice that hangs on the order of a set",
    (
        Edit(
            "tests/simulation/world.py",
            "return self.cores[self._num_begun % len(self.cores)]",
            "names = list({core.name for core in self.cores})\n"
            "        return next(core for core in self.cores if core.name == names[self._num_begun % len(names)])",
        ),
    ),
)


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """The sources of this moment: a history belongs to a seed and to the code that makes it."""
    with copied_tree() as root:
        yield root


def digest(tree: Path, seed: int, hash_seed: str) -> str:
    """The history that a process of its own makes from this seed."""
    run = simulation(tree, "seed", str(seed), "--requests", str(NUM_REQUESTS), hash_seed=hash_seed)
    assert run.returncode == 0, run.stderr
    return run.stdout.split()[1]


def test_one_seed_is_one_history_in_processes_with_different_hashes_and_another_seed_another(tree: Path) -> None:
    first, second = (digest(tree, 1, hash_seed) for hash_seed in HASH_SEEDS)
    assert first == second
    assert play(2, num_requests=NUM_REQUESTS).digest != first


def test_a_seed_leaves_nothing_behind_that_changes_the_next_one() -> None:
    alone = play(5, num_requests=NUM_REQUESTS).digest
    play(6, num_requests=NUM_REQUESTS)
    assert play(5, num_requests=NUM_REQUESTS).digest == alone


def test_a_choice_that_hangs_on_the_order_of_a_set_is_found(tree: Path) -> None:
    """Negative control of the tests above."""
    with planted(UNORDERED, tree):
        assert len({digest(tree, 1, hash_seed) for hash_seed in HASH_SEEDS}) > 1


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


def test_each_process_sees_the_time_of_its_own_machine() -> None:
    async def sleep_a_minute() -> float:
        began = now()
        await asyncio.sleep(60.0)
        return now() - began

    async def body(loop: ProcessLoop) -> None:
        loop.clocks["fast"] = MachineClock(offset=500.0, rate=1.25)
        assert await run_as("fast", sleep_a_minute()) == pytest.approx(60.0)
        assert now() == pytest.approx(48.0)

    loop = ProcessLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(body(loop))
