"""Processes on one virtual loop: each has a clock of its own, can be stopped as SIGSTOP stops it, and go on later.

What belongs to a process is told by a context variable that its tasks, callbacks and timers inherit. While a
process is frozen its handles are parked: it runs no step, no timer and no handler, and finds itself much later
when it wakes, with everything that has come meanwhile in its queues.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from virtual_loop import VirtualLoop

P = ParamSpec("P")
T = TypeVar("T")

process_name: contextvars.ContextVar[str | None] = contextvars.ContextVar("process_name", default=None)


@contextmanager
def acting_as(name: str | None) -> Iterator[None]:
    """What is started inside belongs to this process; None: to nobody, as the network and the test do."""
    token = process_name.set(name)
    try:
        yield
    finally:
        process_name.reset(token)


async def run_as(name: str, coroutine: Coroutine[Any, Any, T]) -> T:
    with acting_as(name):
        task = asyncio.get_running_loop().create_task(coroutine, name=f"run-{name}")
    return await task


def owned(name: str | None, call: Callable[P, T]) -> Callable[P, T]:
    """`call` as an event of that process, whoever causes it."""

    def as_owner(*args: P.args, **kwargs: P.kwargs) -> T:
        with acting_as(name):
            return call(*args, **kwargs)

    return as_owner


@dataclass(frozen=True)
class MachineClock:
    """A machine's monotonic clock: where it began, and how fast it goes."""

    offset: float  # seconds
    rate: float  # of its seconds per true second

    def local(self, true: float) -> float:
        return self.offset + true * self.rate

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate


class ProcessLoop(VirtualLoop):
    """A virtual loop on which processes can be frozen, and see the time on their own machines' clocks."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__(limit)
        self.clocks: dict[str | None, MachineClock] = {}  # by process; true time for all others
        self._parked: dict[str, tuple[list[asyncio.Handle], list[asyncio.TimerHandle]]] = {}

    def time(self) -> float:
        now = self._selector.now
        clock = self.clocks.get(process_name.get()) if self.clocks else None
        return now if clock is None else clock.offset + now * clock.rate

    def call_at(self, when: float, callback: Any, *args: Any, context: Any = None) -> asyncio.TimerHandle:
        clock = self.clocks.get(process_name.get()) if self.clocks else None
        return super().call_at(when if clock is None else clock.true(when), callback, *args, context=context)

    def is_frozen(self, name: str) -> bool:
        return name in self._parked

    def freeze(self, name: str) -> None:
        timers = [handle for handle in self._scheduled if _owner(handle) == name]
        ready = [handle for handle in self._ready if _owner(handle) == name]
        self._scheduled = [handle for handle in self._scheduled if _owner(handle) != name]
        heapq.heapify(self._scheduled)
        for handle in ready:
            self._ready.remove(handle)
            self.call_soon(_nothing)  # the turn that runs now counts on as many handles as it has seen
        self._parked[name] = (ready, timers)

    def thaw(self, name: str) -> None:
        """First what has come, then the timers that are due, as an event loop does after SIGCONT."""
        ready, timers = self._parked.pop(name)
        self._ready.extend(ready)
        for handle in timers:
            heapq.heappush(self._scheduled, handle)

    def _call_soon(self, callback: Any, args: Any, context: Any) -> asyncio.Handle:
        handle = super()._call_soon(callback, args, context)
        if self._parked and (parked := self._parked.get(_owner(handle))) is not None:
            self._ready.pop()
            parked[0].append(handle)
        return handle


def _nothing() -> None:
    pass


def _owner(handle: asyncio.Handle) -> Any:
    return handle._context.get(process_name)
