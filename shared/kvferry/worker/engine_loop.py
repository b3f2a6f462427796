"""The engine's loop: decide, execute, account for, again.

    wake ──> decide (event loop) ──plan──> execute (engine lane) ──result──> finish, emit (event loop) ──> decide
                                              ▲      │ tokens, in their places
                       plan ahead ──plan──────┴──────┘

A decision sees all that the step before it has changed. But where streams only decode there is nothing to decide: while
a step runs the one behind it is planned already, on tokens that are not drawn yet, and the engine goes on with it by
itself. Whatever wakes the loop meanwhile takes that plan back, if its step has not begun, and a decision follows.

What a step gave is published and counted when the next one has begun, since before that it would keep the engine
waiting; but at once where the engine's threads take all cores, and nothing is planned ahead: they wait for each other
when one of them gives way in mid-step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from kvferry.bus.liveness import BEAT_INTERVAL, STALL
from kvferry.errors import RankLost
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.schedule.step import StepPlan, StepResult

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker

log = get_logger(__name__)
STEP_SMOOTHING: Final = 0.1
MAX_STEP_GROWTH: Final = 8.0  # of one step over the mean, as far as the mean takes it in


@dataclass(frozen=True, slots=True)
class _Step:
    """A step that the engine lane has."""

    plan: StepPlan
    result: asyncio.Future[StepResult]


class EngineLoop:
    """Runs the steps that a worker's scheduler plans. Only the event loop calls it."""

    def __init__(self, worker: Worker[Any]) -> None:
        self.num_steps = 0
        self.step_s = 0.0  # mean of late
        self._worker = worker
        self._lane: Lane = worker.runtime.lane("engine")
        self._has_spare_core = 0 < worker.settings.threads < worker.runtime.num_cores
        self._work = asyncio.Event()
        self._ahead: _Step | None = None  # planned while the step before it runs
        self._step_began: float | None = None
        self._looked_at = 0.0  # at the step under way
        self._stuck_s = 0.0
        self._uncounted: Callable[[], None] | None = None

    def wake(self) -> None:
        """Something changed that may give the engine work."""
        self._work.set()
        if self._ahead is not None and self._lane.take_back(self._ahead.result):
            self._ahead = None
            self._worker.scheduler.under_way.take_back()

    async def run(self) -> None:
        """Until cancelled."""
        worker = self._worker
        while True:
            self._work.clear()  # before the decision: what it drops may give it work again
            decision = worker.decide(now())
            worker.drop(*decision.dropped)
            if decision.plan is None:
                self._tell()
                await self._work.wait()
                continue
            step: _Step | None = self._begin(decision.plan, self._tell if self._has_spare_core else None)
            while step is not None:
                self._begin_ahead()
                await self._end(step)
                worker.observe_freed()
                step, self._ahead = self._ahead, None

    def close(self) -> None:
        """Wait for the step that runs. Its result is nobody's: the scheduler must abandon it."""
        self._lane.close()

    def stuck_s(self, moment: float) -> float:
        """Seconds that the step under way has taken; 0 without one. To be asked at every heartbeat.

        Of a time in which this loop itself stood still (SIGSTOP, a suspended machine) only as much counts as passes
        between two heartbeats: the engine stood still with it.
        """
        if self._step_began is None:
            return 0.0
        self._stuck_s += min(moment - self._looked_at, BEAT_INTERVAL + STALL)
        self._looked_at = moment
        return self._stuck_s

    def _begin(self, plan: StepPlan, begun: Callable[[], None] | None = None) -> _Step:
        self._worker.grammars.begin(plan)
        return _Step(plan, self._lane.run_telling(begun, self._worker.runner.execute, plan))

    def _begin_ahead(self) -> None:
        if self._has_spare_core and not self._work.is_set():
            plan = self._worker.decide_ahead()
            self._ahead = None if plan is None else self._begin(plan)

    async def _end(self, step: _Step) -> None:
        worker, plan = self._worker, step.plan
        began = self._step_began = self._looked_at = now()
        self._stuck_s = 0.0
        try:
            result = await step.result
        except RankLost as error:
            # The process ends in a moment (`ranks.py`). If it told of failures till then it would be asked again at
            # once, and once more, until its requests have failed for good. Should it not end, this step never does.
            log.error("engine step failed", error=str(error), num_tokens=plan.num_tokens)
            if self._ahead is not None:
                self._ahead.result.cancel()  # nobody hears that it has failed, too
            await asyncio.get_running_loop().create_future()
            return
        except Exception as error:
            # A step that fails must cost its own sequences and nobody else's; their gateways count the failure.
            log.exception("engine step failed", num_tokens=plan.num_tokens)
            await self._end_vainly()
            worker.drop(*worker.scheduler.abandon_step(type(error).__name__))
            return
        finally:
            self._step_began = None
        seconds = now() - began
        self.num_steps += 1
        self.step_s = smoothed(self.step_s, seconds)
        self._uncounted = partial(self._count, plan, result, seconds)
        emissions = worker.scheduler.finish(plan, result, now())
        worker.traces.stepped(began)
        worker.grammars.ended(plan)
        for emission in emissions:
            worker.emit(emission)
        worker.stepped(emissions)
        if self._ahead is not None or not self._has_spare_core:
            self._tell()

    async def _end_vainly(self) -> None:
        """What was planned on a step that failed has no tokens to go on with."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and not self._lane.take_back(ahead.result):
            await asyncio.gather(ahead.result, return_exceptions=True)

    def _tell(self) -> None:
        """What the last step gave: a step has begun, or there is none to do."""
        uncounted, self._uncounted = self._uncounted, None
        if uncounted is not None:
            uncounted()
        self._worker.post.wake()

    def _count(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        metrics = self._worker.metrics
        drawn = sum(token is not None for token in result.tokens)
        metrics.steps.observe(seconds)
        metrics.batch.set(len(plan.steps))
        metrics.tokens.labels("drawn").inc(drawn)
        metrics.tokens.labels("prefill").inc(sum(len(s.tokens) for s in plan.steps if len(s.tokens) > 1))


def smoothed(mean: float, seconds: float) -> float:
    """The mean of late with another step; 0 before the first.

    A step that was frozen with its process, or paged out, tells nothing of those to come: it counts as
    `MAX_STEP_GROWTH` times the mean at the most. Steps that stay long are followed all the same, a few later.
    """
    if not mean:
        return seconds
    return mean + (min(seconds, MAX_STEP_GROWTH * mean) - mean) * STEP_SMOOTHING
