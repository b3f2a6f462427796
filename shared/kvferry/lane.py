"""Lanes: where blocking calls run, one after the other, off the event loop."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import os
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Lane(ABC):
    """A queue of blocking calls that run one after the other, off the event loop."""

    def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Run `call` after all calls given before it. Awaiting the result is optional; cancelling the future
        keeps a call from starting, and does not end one that has."""
        return self.run_telling(None, call, *args, **kwargs)

    @abstractmethod
    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        """As `run`; and `began` is called on the loop when the call begins. What it does then does not stand between
        this thread and the interpreter's lock, which a call needs for its first lines."""

    @abstractmethod
    def take_back(self, future: asyncio.Future[Any]) -> bool:
        """Cancel a call that has not begun. False: it has, and runs to its end."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what runs, but for a daemon's, then end the thread. Calls that have not started are cancelled."""

    async def drain(self) -> None:
        """Wait until all calls given before have ended, and who awaits them has heard."""
        heard = asyncio.Event()
        # A callback, not an await: a result that is there already would be awaited before others are heard.
        self.run(_nothing).add_done_callback(lambda _: heard.set())
        await heard.wait()


class ThreadLane(Lane):
    """One thread. Calls that wait are run in one visit of it, and what has ended by then is told to the loop at
    once: under load neither side wakes the other for every call."""

    def __init__(self, name: str, nice: int = 0, *, daemon: bool = False) -> None:
        """`nice` is added to the thread's niceness, where the system has one for each thread. `daemon`: neither `close`
        nor the end of the process waits for a call that runs."""
        lower = functools.partial(_lower_priority, nice) if nice else _nothing
        # The executor owns the thread, which begins with the first call; an ordinary one is joined when the interpreter
        # ends.
        self._executor = (
            _DaemonExecutor(name, lower)
            if daemon
            else concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix=name, initializer=lower)
        )
        self._calls: deque[_Call] = deque()
        self._ended: deque[_Call] = deque()
        self._visiting = False
        self._loop_woken = False
        self._closed = False

    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        if self._closed:
            raise RuntimeError("the lane is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._calls.append(_Call(functools.partial(call, *args, **kwargs), future, began))
        if not self._visiting:
            self._visiting = True
            self._executor.submit(self._visit, loop)
        return future

    def take_back(self, future: asyncio.Future[Any]) -> bool:
        call = next((call for call in list(self._calls) if call.future is future), None)
        if call is None:
            return False
        try:
            self._calls.remove(call)  # or the thread has taken it meanwhile
        except ValueError:
            return False
        future.cancel()
        return True

    def _visit(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread: run what waits, until nothing does."""
        while True:
            while self._calls and not self._closed:
                self._execute_one(loop)
                self._tell(loop)
            self._visiting = False
            # Looked at after the flag is down: `run` looks at the flag after it has queued its call. If both see
            # the call there is one visit too many, which finds nothing.
            if not self._calls or self._closed:
                return
            self._visiting = True

    def _execute_one(self, loop: asyncio.AbstractEventLoop) -> None:
        call = self._calls.popleft()
        if call.began is not None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(call.began)
        call.execute()
        self._ended.append(call)

    def _tell(self, loop: asyncio.AbstractEventLoop) -> None:
        if not self._loop_woken:
            self._loop_woken = True
            with contextlib.suppress(RuntimeError):  # a loop that is closed leaves nobody to hear
                loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        # Cleared first: what ends from here on wakes the loop again.
        self._loop_woken = False
        for _ in range(len(self._ended)):
            self._ended.popleft().deliver()

    def close(self) -> None:
        self._closed = True
        self._executor.shutdown(wait=True)
        while self._calls:
            self._calls.popleft().future.cancel()


class InlineLane(Lane):
    """Runs each call at once, on the loop; its result is a finished future."""

    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if began is not None:
            began()
        try:
            future.set_result(call(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def take_back(self, future: asyncio.Future[Any]) -> bool:
        return False

    def close(self) -> None:
        pass


class _DaemonExecutor:
    """One thread that nobody waits for."""

    def __init__(self, name: str, initializer: Callable[[], None]) -> None:
        self._initializer = initializer
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)

    def submit(self, call: Callable[P, None], /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self._thread.ident is None:
            self._thread.start()
        self._calls.put(functools.partial(call, *args, **kwargs))

    def shutdown(self, *, wait: bool) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        self._initializer()
        while (call := self._calls.get()) is not None:
            call()


@dataclass(slots=True, eq=False)
class _Call:
    """A call on its way through a lane, and its outcome."""

    call: Callable[[], Any]
    future: asyncio.Future[Any]
    began: Callable[[], None] | None
    result: Any = None
    error: Exception | None = None

    def execute(self) -> None:
        if self.future.cancelled():
            return
        try:
            self.result = self.call()
        except Exception as error:
            self.error = error

    def deliver(self) -> None:
        if self.future.done():
            return  # cancelled meanwhile
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


def _lower_priority(nice: int) -> None:
    """Of the calling thread. Only Linux counts niceness by thread, and takes a thread's id for a process's."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)


def _nothing() -> None:
    """What `drain` runs, and a thread of ordinary priority at its begin."""
