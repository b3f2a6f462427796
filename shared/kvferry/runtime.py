"""What a process takes from outside itself: randomness, ids, threads, blocking clocks, signals.

Everything else gets time from its event loop (`loop.time()`) and the rest from a `Runtime`, so that a
whole cluster can run in one process on a virtual clock, from one seed (`tests/simulation`). A lint rule
keeps `time`, `random`, `uuid`, `secrets` and `to_thread` inside this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import random
import secrets
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final, TypeVar

from kvferry.lane import InlineLane, Lane, ThreadLane

T = TypeVar("T")
MADV_POPULATE_WRITE: Final = 23  # of Linux 5.14; `mmap` does not name it


class Runtime(ABC):
    """Randomness, ids and threads of one process."""

    @abstractmethod
    def random_bytes(self, count: int) -> bytes: ...

    @abstractmethod
    def uniform(self) -> float:
        """In [0, 1): for jitter, never for ids."""

    @abstractmethod
    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        """A new lane. Its thread gives way to others of the process by `nice`, as a Unix process would. Nobody waits
        for the calls of a `daemon` at its end."""

    @property
    @abstractmethod
    def num_cores(self) -> int:
        """That this process may run on."""

    @abstractmethod
    def wall_clock(self) -> float:
        """Unix seconds: the `created` field of API objects, the arrival order of requests, instants of traces; nothing
        else."""

    def random_u64(self) -> int:
        return int.from_bytes(self.random_bytes(8), "little")


class SystemRuntime(Runtime):
    """The real one."""

    def __init__(self) -> None:
        self._jitter = random.Random(secrets.randbits(64))  # noqa: S311 - jitter only

    def random_bytes(self, count: int) -> bytes:
        return secrets.token_bytes(count)

    def uniform(self) -> float:
        return self._jitter.random()

    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        return ThreadLane(name, nice, daemon=daemon)

    @property
    def num_cores(self) -> int:
        return usable_cores()

    def wall_clock(self) -> float:
        return wall_clock()


class SeededRuntime(Runtime):
    """Deterministic: draws from one seed, runs lanes on the event loop. For simulation and tests."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 - determinism is the point

    def random_bytes(self, count: int) -> bytes:
        return self._random.randbytes(count)

    def uniform(self) -> float:
        return self._random.random()

    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        return InlineLane()

    @property
    def num_cores(self) -> int:
        return 2  # more than a worker has threads here: what is done beside a step is done so in simulations, too

    def wall_clock(self) -> float:
        return now()


def usable_cores() -> int:
    """That this process may run on."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on macOS
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


def now() -> float:
    """The running loop's clock, seconds."""
    return asyncio.get_running_loop().time()


def blocking_clock() -> float:
    """Monotonic seconds for threads that have no event loop (the engine thread times its steps)."""
    return time.perf_counter()


def wall_clock() -> float:
    """Unix seconds, for what has no `Runtime`: the date in chat templates, the doctor's look at clocks."""
    return time.time()


def blocking_sleep(seconds: float) -> None:
    """For threads and plain programs without an event loop."""
    time.sleep(seconds)


def mapped_memory(num_bytes: int) -> mmap.mmap:
    """Zeroed, page-aligned, in huge pages where the kernel gives them, all of it in RAM.

    With 4 KiB pages the copies of KV miss the TLB at every page. Private, because the pages of a shared
    mapping are a file's, and stay small.
    """
    if not hasattr(mmap, "MAP_ANONYMOUS"):
        return mmap.mmap(-1, num_bytes)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _take(memory)
    return memory


def _take(memory: mmap.mmap) -> None:
    """Have the kernel find the pages now, in huge ones if it can.

    Else it does at the first write to each, while streams wait: for 2 MiB in a row it may have to move others, or to
    ask a hypervisor, which takes ten milliseconds and more. And memory that isn't there is missed at the start.
    """
    for advice in (getattr(mmap, "MADV_HUGEPAGE", None), MADV_POPULATE_WRITE if sys.platform == "linux" else None):
        if advice is not None:
            with contextlib.suppress(OSError):  # a kernel without it; most keep the pages of files small
                memory.madvise(advice)


class TaskSet:
    """Background tasks of one owner: references kept, cancelled in creation order, failures reported."""

    def __init__(self, on_failure: Callable[[str, BaseException], None]) -> None:
        self._tasks: dict[asyncio.Task[Any], None] = {}
        self._on_failure = on_failure

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._tasks[task] = None
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.pop(task, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(task.get_name(), error)

    async def cancel(self) -> None:
        """Cancel all and wait until they have ended."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.contextmanager
def stop_signals(loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Event]:
    """SIGINT and SIGTERM set the event; a second one ends the process as by default."""
    stop = asyncio.Event()

    def handle(number: signal.Signals) -> None:
        stop.set()
        loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    try:
        yield stop
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
