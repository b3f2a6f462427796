"""What the shell needs of a scheduler; `kvferry_prefill.scheduler` and `kvferry_decode.scheduler` provide it."""

from __future__ import annotations

from typing import Protocol

from kvferry.schedule.chunk import ChunkBudget
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Dropped, Emission, Key, Sequence
from kvferry.schedule.step import StepPlan, StepResult
from kvferry.schedule.under_way import StepsUnderWay


class Decision(Protocol):
    @property
    def plan(self) -> StepPlan | None: ...

    @property
    def dropped(self) -> tuple[Dropped, ...]: ...


class Scheduler(Protocol):
    """Synchronous and pure; only the event loop calls it."""

    memory: KVMemory
    chunk: ChunkBudget
    sequences: dict[Key, Sequence]
    under_way: StepsUnderWay

    @property
    def num_waiting(self) -> int: ...

    @property
    def num_running(self) -> int: ...

    @property
    def queued_tokens(self) -> tuple[int, ...]: ...

    def displace(self, urgent: Sequence) -> Dropped | None:
        """Give up a queued sequence for one that the full queue has refused, if one has a lower priority."""

    def cancel(self, key: Key) -> Sequence | None: ...

    def finish(self, plan: StepPlan, result: StepResult, now: float) -> list[Emission]: ...

    def abandon_step(self, detail: str) -> list[Dropped]: ...

    def expire(self, now: float) -> list[Dropped]: ...

    def drain(self) -> list[Dropped]: ...

    def hand_over(self) -> list[Dropped]: ...
