"""The engine's lane on a virtual clock: a step takes as many virtual seconds as the runner says that it took."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, ParamSpec, TypeVar

from kvferry.lane import InlineLane, Lane
from kvferry.runtime import SeededRuntime
from kvferry.schedule.step import StepResult

P = ParamSpec("P")
T = TypeVar("T")


class VirtualEngineLane(InlineLane):
    """A step has its effect when it begins, and ends when its own virtual seconds have passed; then the next begins."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None] | None, Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._busy = False

    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((began, partial(call, *args, **kwargs), future))
        if not self._busy:
            self._begin()
        return future

    def take_back(self, future: asyncio.Future[Any]) -> bool:
        for waiting in self._waiting:
            if waiting[2] is future:
                self._waiting.remove(waiting)
                return future.cancel()
        return False

    def close(self) -> None:
        for *_, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def _begin(self) -> None:
        self._busy = bool(self._waiting)
        if not self._busy:
            return
        began, call, future = self._waiting.popleft()
        if began is not None:
            began()
        try:
            result = call()
        except Exception as error:
            future.set_exception(error)
            asyncio.get_running_loop().call_soon(self._begin)
            return
        seconds = result.seconds if isinstance(result, StepResult) else 0.0
        asyncio.get_running_loop().call_later(seconds, self._end, future, result)

    def _end(self, future: asyncio.Future[Any], result: Any) -> None:
        if not future.done():
            future.set_result(result)
        self._begin()


class SimulationRuntime(SeededRuntime):
    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        return VirtualEngineLane() if name == "engine" else InlineLane()
