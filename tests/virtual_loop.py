"""An asyncio event loop on virtual time, for simulations that one seed decides.

Time stands still while callbacks run, and jumps to the next timer when none is ready: an hour of heartbeats
takes a second, and no two runs differ. There are no sockets, no threads and no signals on this loop; code
that reaches for one of them fails at once, because its history would not be the seed's alone.
"""

from __future__ import annotations

import asyncio
import hashlib
from asyncio import base_events
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvferry.runtime import SeededRuntime

T = TypeVar("T")
Scenario = Callable[[SeededRuntime, "EventLog"], Coroutine[Any, Any, T]]
Field = str | int | float | bytes | bool | None


class Deadlock(RuntimeError):
    """Nothing is ready and no timer is set: the scenario would wait for ever."""


class VirtualTimeout(RuntimeError):
    """The scenario's clock ran past its limit: it only waits for timers that set each other."""


class _Clock:
    """Takes the place of the selector: where a real loop would sleep, the clock moves."""

    def __init__(self, limit: float) -> None:
        self.now = 0.0
        self._limit = limit

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Deadlock(f"at virtual time {self.now:.6f}: nothing is ready and no timer is set")
        if timeout > 0:
            self.now += timeout
            if self.now > self._limit:
                raise VirtualTimeout(f"not done at virtual time {self._limit:.6f}")
        return []


class VirtualLoop(base_events.BaseEventLoop):
    """`limit` is the virtual second at which a scenario that is not done fails."""

    def __init__(self, limit: float = float("inf")) -> None:
        super().__init__()
        self._selector = _Clock(limit)  # where BaseEventLoop looks for it

    def time(self) -> float:
        return self._selector.now

    def _process_events(self, event_list: list[Any]) -> None:
        assert not event_list

    def _write_to_self(self) -> None:
        """Wakes a sleeping loop. This one never sleeps."""

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        raise RuntimeError("a thread on a virtual loop: its timing is not the seed's")


class EventLog:
    """What happened, in order, and its running hash: two runs are the same if their hashes are."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.events: list[tuple[float, tuple[Field, ...]]] = []
        self._clock = clock
        self._hash = hashlib.sha256()

    def record(self, *fields: Field) -> None:
        event = (self._clock(), fields)
        self.events.append(event)
        self._hash.update(repr(event).encode())

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()


@dataclass(frozen=True)
class VirtualRun(Generic[T]):
    result: T
    log: EventLog
    seconds: float  # virtual


def run_virtual(scenario: Scenario[T], seed: int, limit: float = 3600.0) -> VirtualRun[T]:
    """Run `scenario(runtime, log)` to its end on a loop of its own. Tasks that it leaves are cancelled.

    Raises what the scenario raises, `Deadlock`, or `VirtualTimeout` after `limit` virtual seconds.
    """
    loop = VirtualLoop(limit)
    log = EventLog(loop.time)
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        result = runner.run(scenario(SeededRuntime(seed), log))
        return VirtualRun(result, log, loop.time())
