"""Both schedulers under any history of events: the books always add up, and there is always a way on."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from sequences import BLOCK, assert_all_free, result_of, sequence_of

from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import ModelLimits, Sequence
from kvferry.schedule.step import StepPlan
from kvferry_decode.scheduler import DecodePolicy, DecodeScheduler
from kvferry_prefill.scheduler import PrefillPolicy, PrefillScheduler

BLOCKS = 10
LIMITS = ModelLimits(BLOCKS * BLOCK, frozenset({2}))
LENGTHS = st.integers(1, 24)  # 60 % of the pool


class SchedulerMachine(RuleBasedStateMachine):
    """What both have in common: time, steps, cancels, copies that pin."""

    scheduler: Any

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.plan: StepPlan | None = None
        self.ahead: StepPlan | None = None
        self.pinned: list[Sequence] = []
        self.scheduler = self.make()

    def make(self) -> Any:
        raise AssertionError

    def pick(self, choice: int) -> Sequence | None:
        sequences = list(self.scheduler.sequences.values())
        return sequences[choice % len(sequences)] if sequences else None

    @rule(seconds=st.floats(0.01, 5.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(choice=st.integers(0, 50))
    def cancel(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None:
            assert self.scheduler.cancel(sequence.key) is sequence
            assert self.scheduler.cancel(sequence.key) is None

    @rule(choice=st.integers(0, 50))
    def begin_copy(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None and sequence.num_blocks:
            self.scheduler.memory.pin(sequence)
            self.pinned.append(sequence)

    @precondition(lambda self: self.pinned)
    @rule()
    def end_copy(self) -> None:
        self.scheduler.memory.unpin(self.pinned.pop(0))

    @precondition(lambda self: self.plan is None)
    @rule()
    def begin_step(self) -> None:
        decision = self.scheduler.plan(self.now)
        self.plan = decision.plan
        for item in decision.dropped:
            assert item.sequence.key not in self.scheduler.sequences

    @precondition(lambda self: self.plan is not None)
    @rule(token=st.sampled_from([2, 5, 6, 7]))
    def end_step(self, token: int) -> None:
        assert self.plan is not None
        plan, self.plan, self.ahead = self.plan, self.ahead, None
        for emission in self.scheduler.finish(plan, result_of(plan, token), self.now):
            assert (emission.reason is None) == (emission.sequence.key in self.scheduler.sequences)

    @precondition(lambda self: self.plan is not None)
    @rule()
    def step_fails(self) -> None:
        self.plan = self.ahead = None
        self.scheduler.abandon_step("failed")

    @rule()
    def expire(self) -> None:
        self.scheduler.expire(self.now)

    @invariant()
    def books_add_up(self) -> None:
        self.scheduler.memory.check_integrity()
        held = {holding.holder for holding in self.scheduler.memory.ledger}
        live = {s.key for s in self.scheduler.sequences.values() if s.num_blocks}
        doomed = {s.key for s in self.pinned if s.doomed}
        assert live <= held
        if self.plan is None:
            assert held == live | doomed

    def settle(self) -> None:
        """What runs and copies comes to its end."""
        while self.pinned:
            self.end_copy()
        while self.plan is not None:
            self.end_step(7)

    def teardown(self) -> None:
        self.settle()
        ends = 0
        for _ in range(2000):
            if not self.scheduler.sequences:
                break
            before = self.standing()
            self.advance()
            ends += self.standing() != before
            self.now += 0.1
        assert not self.scheduler.sequences, f"no way on: {[s.state for s in self.scheduler.sequences.values()]}"
        assert_all_free(self.scheduler.memory)

    def standing(self) -> list[tuple[Any, ...]]:
        return [(s.key, s.state, s.num_computed, s.num_tokens) for s in self.scheduler.sequences.values()]

    def advance(self) -> None:
        """Let the world do what it does in the end: steps end, pulls end."""
        self.begin_step()
        if self.plan is not None:
            self.end_step(7)


class PrefillMachine(SchedulerMachine):
    scheduler: PrefillScheduler

    def make(self) -> PrefillScheduler:
        self.open: set[tuple[bytes, int]] = set()
        policy = PrefillPolicy(max_waiting=8, max_num_batched_tokens=8, overtake_s=0.5, lease_s=3.0)
        scheduler = PrefillScheduler(KVMemory(BLOCKS, BLOCK), LIMITS, policy)
        scheduler.has_open = lambda key: key in self.open
        return scheduler

    @rule(length=LENGTHS, shared=st.booleans(), arrival=st.integers(0, 5), deadline=st.sampled_from([None, 1.0]))
    def add(self, length: int, shared: bool, arrival: int, deadline: float | None) -> None:
        prompt = range(length) if shared else length
        self.scheduler.add(sequence_of(prompt, arrival=float(arrival), deadline=deadline, now=self.now))

    @rule(choice=st.integers(0, 50))
    def opens(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None:
            self.open.add(sequence.key)

    @rule(choice=st.integers(0, 50))
    def closes(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None:
            self.open.discard(sequence.key)
            self.scheduler.hold_again(sequence.key, self.now)

    def advance(self) -> None:
        super().advance()
        for sequence in list(self.scheduler.sequences.values()):
            if sequence.state == "held":
                self.scheduler.cancel(sequence.key)  # D acknowledges
                break


class DecodeMachine(SchedulerMachine):
    scheduler: DecodeScheduler

    def make(self) -> DecodeScheduler:
        policy = DecodePolicy(
            max_waiting=8, max_num_seqs=4, max_num_batched_tokens=8, overtake_s=0.5, pull_deadline_s=4.0,
            watermark_blocks=2,
        )  # fmt: skip
        return DecodeScheduler(KVMemory(BLOCKS, BLOCK), LIMITS, policy)

    @rule(length=LENGTHS, pull=st.booleans(), arrival=st.integers(0, 5), max_tokens=st.integers(1, 12))
    def add(self, length: int, pull: bool, arrival: int, max_tokens: int) -> None:
        sequence = sequence_of(length, arrival=float(arrival), max_tokens=max_tokens, now=self.now)
        self.scheduler.add(sequence, pull)

    @rule(choice=st.integers(0, 50))
    def due(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None:
            self.scheduler.due(sequence.key)

    @rule(choice=st.integers(0, 50))
    def fetched(self, choice: int) -> None:
        if (sequence := self.pick(choice)) is not None:
            was = sequence.state
            assert (self.scheduler.fetched(sequence.key, 7, self.now) is not None) == (was == "fetching")

    @precondition(lambda self: self.plan is not None and self.ahead is None)
    @rule()
    def plan_ahead(self) -> None:
        self.ahead = self.scheduler.plan_ahead()

    @precondition(lambda self: self.ahead is not None)
    @rule()
    def take_back(self) -> None:
        self.ahead = None
        self.scheduler.under_way.take_back()

    @invariant()
    def what_runs_goes_on_where_it_stands(self) -> None:
        """A step of a live sequence begins with its first token that is not computed."""
        for sequence in self.scheduler.sequences.values():
            for number, plan in enumerate((self.plan, self.ahead)):
                for step in plan.steps if plan is not None else ():
                    if step.sequence_id == sequence.sequence_id:
                        assert step.start == sequence.num_computed + number
                        assert np.shares_memory(step.tokens, sequence.step_ahead().tokens) == (number == 1)
                        assert len(step.block_table) * BLOCK >= step.start + len(step.tokens)

    def advance(self) -> None:
        for sequence in list(self.scheduler.sequences.values()):
            self.scheduler.due(sequence.key)
            self.scheduler.fetched(sequence.key, 7, self.now)
        super().advance()


PrefillMachine.TestCase.settings = DecodeMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40)
TestPrefillMachine = PrefillMachine.TestCase
TestDecodeMachine = DecodeMachine.TestCase
