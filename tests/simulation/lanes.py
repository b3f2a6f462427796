"""Threads of the simulation: their calls take virtual time, and more of it while their machine's disk is slow."""

from __future__ import annotations

import asyncio
import functools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from processes import process_name
from ranks import SimulatedRanks

from kvferry.lane import InlineLane, Lane
from kvferry.runtime import SeededRuntime
from kvferry.schedule.step import StepPlan

P = ParamSpec("P")
T = TypeVar("T")
MAX_COPY_S = 0.002  # of one gather or scatter
SECONDS_PER_STEP = 0.004
SECONDS_PER_TOKEN = 0.001


def step_seconds(plan: StepPlan) -> float:
    return SECONDS_PER_STEP + plan.num_tokens * SECONDS_PER_TOKEN


@dataclass(eq=False)
class _Call:
    call: Callable[[], Any]
    future: asyncio.Future[Any]
    began: Callable[[], None] | None
    seconds: float
    early: bool  # it has its effect when it begins; else when it ends


class SimulatedLane(Lane):
    """Calls run one after the other. A call's reads and writes happen at one of its two ends, by chance: so it meets
    what others do to the same blocks before it and after it."""

    def __init__(self, runtime: ProcessRuntime, seconds: Callable[..., float], *, computes: bool = False) -> None:
        """`computes`: what runs here needs all ranks of its worker."""
        self._runtime = runtime
        self._seconds = seconds
        self._computes = computes
        self._calls: deque[_Call] = deque()
        self._timer: asyncio.Handle | None = None
        self._outcome: Callable[[], None] | None = None

    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        seconds = self._seconds(*args)
        early = self._runtime.uniform() < 0.5
        self._calls.append(_Call(functools.partial(call, *args, **kwargs), future, began, seconds, early))
        if self._timer is None:
            self._begin()
        return future

    def take_back(self, future: asyncio.Future[Any]) -> bool:
        waiting = next((call for call in tuple(self._calls)[1:] if call.future is future), None)
        if waiting is None:
            return False
        self._calls.remove(waiting)
        future.cancel()
        return True

    def close(self) -> None:
        """What runs is waited for: it ends now, as far as anybody can see."""
        if self._timer is not None:
            self._timer.cancel()
            self._end()
        for call in self._calls:
            call.future.cancel()
        self._calls.clear()

    def kill(self) -> None:
        """The process is dead."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._outcome = None
        self._calls.clear()

    def _begin(self) -> None:
        call, ranks = self._calls[0], self._ranks
        loop = asyncio.get_running_loop()
        if ranks is not None and ranks.lost:  # nobody waits for a rank that can't be told
            self._outcome = _execute(call)
            self._timer = loop.call_soon(self._go_on)
            return
        if call.began is not None:
            call.began()
        if call.early and (ranks is None or not ranks.hang):
            self._outcome = _execute(call)
        seconds = call.seconds + self._runtime.disks.get(process_name.get(), 0.0) * self._runtime.uniform()
        if ranks is not None:
            seconds += ranks.late_s * self._runtime.uniform()
        self._timer = loop.call_later(seconds, self._ended) if seconds > 0 else loop.call_soon(self._ended)

    @property
    def _ranks(self) -> SimulatedRanks | None:
        return self._runtime.ranks.get(process_name.get()) if self._computes else None

    def _ended(self) -> None:
        if self._timer is None:
            return  # it was closed while it waited for a rank
        ranks = self._ranks
        if ranks is not None and ranks.hang:
            ranks.when_resumed(self._ended)
            return
        self._go_on()

    def _go_on(self) -> None:
        self._end()
        if self._calls:
            self._begin()

    def _end(self) -> None:
        self._timer = None
        call = self._calls.popleft()
        outcome, self._outcome = self._outcome or _execute(call), None
        outcome()


def _execute(call: _Call) -> Callable[[], None]:
    """Run it; returns what tells its owner."""
    if call.future.cancelled():
        return lambda: None
    try:
        result = call.call()
    except Exception as error:
        return functools.partial(_settle, call.future, error)
    return functools.partial(_settle, call.future, None, result)


def _settle(future: asyncio.Future[Any], error: Exception | None, result: Any = None) -> None:
    if future.done():
        return  # cancelled meanwhile
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)


@dataclass
class ProcessRuntime(SeededRuntime):
    """Chance and threads of all processes of a world."""

    seed: int
    disks: dict[str | None, float] = field(default_factory=dict)  # process -> most seconds that a call takes longer
    lanes: dict[str | None, list[SimulatedLane]] = field(default_factory=dict)
    ranks: dict[str | None, SimulatedRanks] = field(default_factory=dict)  # of workers that have several

    def __post_init__(self) -> None:
        super().__init__(self.seed)

    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        if name == "mask":
            return InlineLane()  # a step that wants a mask waits for it, as no lane here can
        computes = name == "engine"
        lane = SimulatedLane(self, step_seconds if computes else self._copy_seconds, computes=computes)
        self.lanes.setdefault(process_name.get(), []).append(lane)
        return lane

    def kill_lanes(self, process: str) -> None:
        self.ranks.pop(process, None)
        for lane in self.lanes.pop(process, []):
            lane.kill()

    def _copy_seconds(self, *_: object) -> float:
        return self.uniform() * MAX_COPY_S
