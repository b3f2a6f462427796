"""Many seeds, in parallel processes."""

from __future__ import annotations

import gc
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

from seed import FailedSeed, Story, play

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


def sweep(first: int, count: int, num_processes: int, *, first_failure: bool = False) -> int:
    """Prints violations as they come, and at the end what was done. Returns how many seeds failed."""
    began = reported = time.monotonic()
    failed: list[int] = []
    hits: Counter[str] = Counter()
    num_requests = num_steps = num_poor = 0
    cpu_s: list[float] = []
    for done, outcome in enumerate(outcomes(range(first, first + count), num_processes), start=1):
        story = outcome.story
        if story is None:
            failed.append(outcome.seed)
            print(f"seed {outcome.seed}: {outcome.failure}", flush=True)
            if first_failure:
                return 1
        else:
            hits.update(story.hits)
            num_requests += story.num_requests
            num_steps += story.num_steps
            num_poor += not story.is_rich
            cpu_s.append(story.cpu_s)
        if time.monotonic() - reported > REPORT_S:
            reported = time.monotonic()
            print(
                f"{done} of {count} seeds, {len(failed)} violations, {done / (reported - began):.2f} seeds/s",
                flush=True,
            )
    seconds = time.monotonic() - began
    cpu_s.sort()
    print(
        f"{count} seeds from {first} on in {seconds:.0f} s by {num_processes} processes "
        f"({count / seconds:.2f} seeds/s): {len(failed)} violations {failed or ''}"
    )
    if cpu_s:
        print(
            f"{num_requests} requests, {num_steps} engine steps, {sum(hits.values())} faults that hit a live request, "
            f"{num_poor} seeds with less than was asked for; "
            f"CPU per seed: median {cpu_s[len(cpu_s) // 2]:.2f} s, most {cpu_s[-1]:.2f} s"
        )
        print(", ".join(f"{kind} {number}" for kind, number in sorted(hits.items())))
    return len(failed)
