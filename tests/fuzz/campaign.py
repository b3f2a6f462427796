"""Batches of fuzzed inputs, each a function of (plane, seed, batch) alone, and what is kept of them.

A batch runs on a cluster of its own, so whatever state its inputs built up is built up again by a replay. A failure
says which input was the last one, and the one command that runs its batch again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Final

from virtual_loop import VirtualLoop

CPU_SECONDS: Final = 10.0  # of one input: many times what any takes, and independent of the machine's other load
SHOWN_CHARS: Final = 2000
LEAST_VALID: Final = 0.3  # of the mutated inputs


class Hang(BaseException):
    """An input took more CPU than any may. Not an Exception: nothing under test may swallow it."""


@dataclass
class Batch:
    """The randomness of one batch, its count, and what its inputs were."""

    plane: str
    seed: int
    number: int
    num_cases: int
    num_mutated: int = 0
    num_valid: int = 0  # of the mutated ones
    last: object = None  # the input that is being tried
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(f"{self.plane} {self.seed} {self.number}")

    @property
    def replay(self) -> str:
        return f'make fuzz ARGS="--plane {self.plane} --seed {self.seed} --batch {self.number} --size {self.num_cases}"'

    @contextlib.contextmanager
    def trying(self, given: object) -> Iterator[None]:
        """One input. A failure within names it."""
        self.last = given
        with cpu_limit(CPU_SECONDS):
            yield

    def count(self, *, mutated: bool, valid: bool) -> None:
        if mutated:
            self.num_mutated += 1
            self.num_valid += valid

    def unexpected(self, problem: str) -> None:
        """Something went wrong out of sight of the one that sent the input: as an exception handler hears it."""
        self.problems.append(problem)

    def check(self) -> None:
        assert not self.problems, self.problems[0]


class Finding(AssertionError):
    """An input that does what no input may."""

    def __init__(self, batch: Batch, error: BaseException) -> None:
        super().__init__(
            f"{type(error).__name__}: {error}\nthe last input: {shown(batch.last)}\nrepeat: {batch.replay}"
        )


Plane = Callable[[Batch], None]
Scenario = Callable[[Batch], Awaitable[None]]


def run_virtually(batch: Batch, play: Scenario) -> None:
    """On a virtual clock. Neither a failure in the loop nor a task that is left stays unseen."""

    async def whole() -> None:
        await play(batch)
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left: {left}"

    loop = VirtualLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        loop.set_exception_handler(lambda _, context: batch.unexpected(f"in the loop: {context}"))
        runner.run(whole())


@dataclass
class Tally:
    """What a campaign has tried."""

    num_cases: int = 0
    num_mutated: int = 0
    num_valid: int = 0

    @property
    def share_valid(self) -> float:
        """Of the mutated inputs."""
        return self.num_valid / max(1, self.num_mutated)


def run_batch(plane: Plane, batch: Batch) -> None:
    """Raises `Finding`."""
    try:
        plane(batch)
        batch.check()
    except (Exception, Hang) as error:
        raise Finding(batch, error) from error


def campaign(name: str, plane: Plane, seed: int, num_cases: int, size: int, *, progress: bool = False) -> Tally:
    """Run so many inputs in batches of `size`. Raises `Finding`."""
    tally = Tally()
    for number in range(-(-num_cases // size)):
        batch = Batch(name, seed, number, size)
        run_batch(plane, batch)
        tally.num_cases += size
        tally.num_mutated += batch.num_mutated
        tally.num_valid += batch.num_valid
        if progress and number % 10 == 9:
            print(f"{name}: {tally.num_cases} inputs, {tally.share_valid:.0%} of the mutated ones valid", flush=True)
    return tally


@contextlib.contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raises `Hang` in the block once it has taken so much CPU time. Main thread only."""

    def over(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s of CPU")

    before = signal.signal(signal.SIGPROF, over)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def shown(given: object) -> str:
    text = repr(given)
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text)} characters)"
