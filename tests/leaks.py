"""What a test may leave behind: nothing. Tasks, threads, descriptors, child processes, shared memory."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

SETTLE_S = 2.0  # for what ends by itself: closing sockets, exiting threads
POLL_S = 0.01
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class Holdings:
    """What this process holds at one moment."""

    tasks: frozenset[asyncio.Task[object]]  # without the one that asks
    threads: frozenset[threading.Thread]
    descriptors: Counter[str]  # by what they point to
    children: frozenset[int]
    segments: frozenset[str]

    @classmethod
    def now(cls) -> Holdings:
        """Call it on the event loop."""
        return cls(
            frozenset(asyncio.all_tasks() - {asyncio.current_task()}),
            # The loop's own executor lives as long as the loop.
            frozenset(thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")),
            _descriptors(),
            frozenset(_children()),
            frozenset(os.listdir(SHARED_MEMORY)) if SHARED_MEMORY.is_dir() else frozenset(),
        )

    def beyond(self, before: Holdings) -> list[str]:
        """In words, what is held now and was not then."""
        return [
            *(f"task {task.get_name()}: {task.get_coro()}" for task in self.tasks - before.tasks),
            *(f"thread {thread.name}" for thread in self.threads - before.threads),
            *(f"descriptor of {target} × {count}" for target, count in (self.descriptors - before.descriptors).items()),
            *(f"child process {pid}" for pid in self.children - before.children),
            *(f"shared memory {name}" for name in self.segments - before.segments),
        ]


async def leaks_since(before: Holdings) -> list[str]:
    """What is left once things had `SETTLE_S` to end. Empty: no leak."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + SETTLE_S
    while (left := Holdings.now().beyond(before)) and loop.time() < deadline:
        await asyncio.sleep(POLL_S)
    return left


def _descriptors() -> Counter[str]:
    found: Counter[str] = Counter()
    for entry in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{entry}")
        except FileNotFoundError:
            continue  # the one that lists the folder
        # A socket's or pipe's number is new each time; its kind is what counts.
        found[target.split(":[")[0]] += 1
    return found


def _children() -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        try:
            found += [int(pid) for pid in Path(f"/proc/self/task/{task}/children").read_text().split()]
        except FileNotFoundError:
            continue  # a thread that has just ended
    return found
