"""Processes on one virtual loop: each can be stopped as SIGSTOP stops it, and go on later.

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


class ProcessLoop(VirtualLoop):
    """A virtual loop on which processes can be frozen."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__(limit)
        self._parked: dict[str, tuple[list[asyncio.Handle], list[asyncio.TimerHandle]]] = {}

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
