"""What a unit has lost so far, and when it was enough. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvferry_gateway.errors import deadline_exceeded, failures_used_up, grammar_failed
from kvferry_gateway.streams.attempt import Lost

CRASHES_TO_ISOLATE: Final = 2  # workers that crashed under a request before it runs alone


@dataclass(slots=True)
class Setbacks:
    """`budget`: failures that end it. `deadline_s`: as the client is told."""

    budget: int
    deadline_s: float
    alone: bool = False  # it is to run in steps of its own, so that it takes nobody with it
    lost_prefills: set[int] = field(default_factory=set)  # incarnations whose data plane broke under it
    _failures: int = 0
    _crashes: int = 0

    def count(self, verdict: Lost, prefill: int | None) -> None:
        """Of an attempt with that prefill worker. Raises `ApiError` when it was the last one."""
        if verdict.reason == "deadline":
            raise deadline_exceeded(self.deadline_s)
        if verdict.reason == "grammar":
            raise grammar_failed(verdict.detail)
        if verdict.reason == "prefill_lost" and prefill is not None:
            # Whether it is gone is known only when a ping goes unanswered; the budget must not be spent till then.
            self.lost_prefills.add(prefill)
        if verdict.crashed:
            self._crashes += 1
        if verdict.is_failure:
            self._failures += 1
        poisonous = verdict.crashed and self.alone
        if poisonous or self._failures >= self.budget:
            raise failures_used_up(self._failures, verdict.reason)
        self.alone = self._crashes >= CRASHES_TO_ISOLATE
