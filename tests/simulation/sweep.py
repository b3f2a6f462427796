"""Many seeds, in parallel processes."""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from seed import FailedSeed, Story, play
from tally import begin

AHEAD = 3  # seeds in hand for each process
REPORT_S = 30.0


@dataclass(frozen=True)
class Outcome:
    seed: int
    story: Story | None
    failure: str = ""


def outcome_of(seed: int) -> Outcome:
    try:
        return Outcome(seed, play(seed))
    except FailedSeed as failure:
        return Outcome(seed, None, str(failure))


def _collect_rarely() -> None:
    """A seed leaves few cycles, and all that is imported stays: looking for garbage costs a twentieth of the time."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


def outcomes(seeds: Iterable[int], num_processes: int) -> Iterator[Outcome]:
    """In the order of the seeds. One process: this one."""
    if num_processes == 1:
        yield from map(outcome_of, seeds)
        return
    # Spawned: a forked child would inherit threads' locks.
    with ProcessPoolExecutor(num_processes, get_context("spawn"), _collect_rarely) as pool:
        waiting = deque[Future[Outcome]]()
        for seed in seeds:
            waiting.append(pool.submit(outcome_of, seed))
            if len(waiting) > AHEAD * num_processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def sweep(
    first: int, count: int, num_processes: int, *, first_failure: bool = False, record: Path | None = None
) -> int:
    """Prints violations as they come, and at the end what was done. Returns how many seeds failed, or had too little.

    `record`: a file that it keeps up to date, and goes on from.
    """
    tally = begin(first, record)
    if tally.num_seeds:
        print(f"{record} has {tally.num_seeds} seeds of these sources, {len(tally.failed)} violations", flush=True)
    num_before, seconds_before = tally.num_seeds, tally.seconds
    began = reported = time.monotonic()
    for outcome in outcomes(range(first + num_before, first + count), num_processes):
        tally.add(outcome.seed, outcome.story)
        now = time.monotonic()
        tally.seconds = seconds_before + now - began
        if outcome.story is None:
            print(f"seed {outcome.seed}: {outcome.failure}", flush=True)
            if first_failure:
                break
        if now - reported > REPORT_S:
            reported = now
            rate = (tally.num_seeds - num_before) / (now - began)
            print(f"{tally.num_seeds} of {count} seeds, {len(tally.failed)} violations, {rate:.2f} seeds/s", flush=True)
            if record is not None:
                tally.save(record)
    if record is not None:
        tally.save(record)
    print(tally)
    return len(tally.failed) + len(tally.poor)
