"""Decisions of a decode worker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from masks import mask_of
from sequences import BLOCK, assert_all_free, result_of, sequence_of

from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Dropped, Emission, ModelLimits, Sequence
from kvferry.schedule.step import StepPlan
from kvferry.wire.sampling import Grammar, Sampling
from kvferry_decode.scheduler import DecodeDecision, DecodePolicy, DecodeScheduler


def scheduler_of(num_blocks: int = 10, **policy: Any) -> DecodeScheduler:
    made = {
        "max_waiting": 8,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "overtake_s": 0.5,
        "pull_deadline_s": 60.0,
        "watermark_blocks": 1,
        **policy,
    }
    return DecodeScheduler(KVMemory(num_blocks, BLOCK), ModelLimits(100, frozenset({2})), DecodePolicy(**made))


def step(scheduler: DecodeScheduler, now: float = 0.0, token: int = 5) -> tuple[DecodeDecision, list[Emission]]:
    decision = scheduler.plan(now)
    if decision.plan is None:
        return decision, []
    return decision, scheduler.finish(decision.plan, result_of(decision.plan, token), now)


def pulled(scheduler: DecodeScheduler, sequence: Sequence) -> None:
    """Take a sequence through its pull."""
    assert scheduler.add(sequence, pull=True) is None
    scheduler.due(sequence.key)
    decision = scheduler.plan(0.0)
    if decision.plan is not None:
        scheduler.finish(decision.plan, result_of(decision.plan), 0.0)
    assert sequence in decision.fetch
    assert scheduler.fetched(sequence.key, 5, 0.0) is not None


def test_a_pull_reserves_only_when_due_and_runs_only_when_fetched() -> None:
    scheduler = scheduler_of()
    sequence = sequence_of(8)
    scheduler.add(sequence, pull=True)
    assert scheduler.plan(0.0).fetch == ()
    assert scheduler.memory.pool.num_free == 10, "opening holds nothing"
    scheduler.due(sequence.key)
    decision = scheduler.plan(0.0)
    assert decision.fetch == (sequence,)
    assert sequence.num_blocks == 3, "prompt + 1"
    assert scheduler.plan(0.0).plan is None
    emission = scheduler.fetched(sequence.key, 5, 0.0)
    assert emission is not None
    assert (emission.index, emission.token, emission.first) == (0, 5, True)
    _, emissions = step(scheduler)
    assert [(e.index, e.first) for e in emissions] == [(1, False)]
    assert scheduler.fetched(sequence.key, 5, 0.0) is None, "a second verdict changes nothing"


def test_a_full_queue_gives_up_also_what_still_opens_its_pull_and_nothing_that_has_memory() -> None:
    scheduler = scheduler_of(max_waiting=2)
    running = sequence_of(4, max_tokens=20, priority=9)
    pulled(scheduler, running)
    opening, waiting = sequence_of(4, priority=5), sequence_of(4, priority=4)
    scheduler.add(opening, pull=True)
    scheduler.add(waiting, pull=False)
    for urgent, victim in ((sequence_of(4), opening), (sequence_of(4), waiting)):
        assert scheduler.add(urgent, pull=False) == "queue_full"
        assert scheduler.displace(urgent) == Dropped(victim, "preempted")
        assert scheduler.add(urgent, pull=False) is None
    assert scheduler.displace(sequence_of(4)) is None
    assert running.state == "running"


def test_a_local_prefill_runs_in_chunks_beside_the_batch() -> None:
    scheduler = scheduler_of(max_num_batched_tokens=8)
    running, local = sequence_of(4, max_tokens=20), sequence_of(12)
    pulled(scheduler, running)
    scheduler.add(local, pull=False)
    rows = []
    while local.state != "running":
        decision, _ = step(scheduler)
        assert decision.plan is not None
        rows.append([len(s.tokens) for s in decision.plan.steps])
    assert rows == [[1, 7], [1, 5]]


def test_a_fetched_sequence_waits_for_its_grammar_beside_a_running_batch() -> None:
    scheduler = scheduler_of()
    sampling = Sampling(temperature=0.0, max_tokens=8, grammar=Grammar("regex", "a"))
    waiting, running = sequence_of(4, sampling=sampling), sequence_of(4)
    pulled(scheduler, waiting)
    assert step(scheduler)[0].plan is None
    pulled(scheduler, running)
    for _ in range(2):
        _, emissions = step(scheduler)
        assert [emission.sequence for emission in emissions] == [running]
    waiting.mask = mask_of(np.ones(32, np.bool_))
    _, emissions = step(scheduler)
    assert {emission.sequence for emission in emissions} == {running, waiting}


def test_the_end_frees_and_publishes() -> None:
    scheduler = scheduler_of()
    sequence = sequence_of(8, max_tokens=3)
    pulled(scheduler, sequence)
    step(scheduler)
    _, emissions = step(scheduler)
    assert emissions[0].reason == "length"
    assert_all_free(scheduler.memory)
    assert scheduler.memory.pool.num_cached == 2


def test_growth_preempts_fetching_ones_first_then_the_youngest_running_one() -> None:
    scheduler = scheduler_of(num_blocks=7, watermark_blocks=0)
    old, young = sequence_of(7, max_tokens=14), sequence_of(7, max_tokens=14)
    pulled(scheduler, old)
    pulled(scheduler, young)
    fetching = sequence_of(7)
    scheduler.add(fetching, pull=True)
    scheduler.due(fetching.key)
    dropped: list[tuple[Sequence, str]] = []
    for _ in range(12):
        decision, _ = step(scheduler)
        dropped += [(item.sequence, item.reason) for item in decision.dropped]
        scheduler.memory.check_integrity()
    assert dropped == [(fetching, "preempted"), (young, "preempted")]
    assert scheduler.num_preempted == 2


def test_the_oldest_is_never_preempted_for_growth() -> None:
    scheduler = scheduler_of(num_blocks=5, watermark_blocks=0)
    old, young = sequence_of(7, max_tokens=12), sequence_of(7, max_tokens=12)
    pulled(scheduler, young)
    pulled(scheduler, old)
    ended = []
    for _ in range(30):
        decision, emissions = step(scheduler)
        assert all(
            (item.sequence is not old and item.sequence is not young)
            or item.sequence.order > min(old.order, young.order)
            for item in decision.dropped
        )
        ended += [e.sequence for e in emissions if e.reason]
    assert old in ended


def test_a_watermark_larger_than_the_pool_lets_an_idle_worker_admit() -> None:
    scheduler = scheduler_of(num_blocks=4, watermark_blocks=100)
    first, second = sequence_of(4, max_tokens=2), sequence_of(4, max_tokens=2)
    for sequence in (first, second):
        scheduler.add(sequence, pull=False)
    ended = []
    for _ in range(6):
        ended += [e.sequence for e in step(scheduler)[1] if e.reason]
    assert ended == [first, second]


def test_an_older_request_takes_memory_back_from_younger_pulls_and_never_from_running_ones() -> None:
    scheduler = scheduler_of()
    old, running, fetching = sequence_of(19), sequence_of(11), sequence_of(15)
    pulled(scheduler, running)
    scheduler.add(fetching, pull=True)
    scheduler.due(fetching.key)
    assert scheduler.plan(0.0).fetch == (fetching,)
    scheduler.finish(*_last(scheduler))
    scheduler.add(old, pull=True)
    scheduler.due(old.key)
    decision, _ = step(scheduler)
    assert [(d.sequence, d.reason) for d in decision.dropped] == [(fetching, "preempted")]
    assert decision.fetch == (old,)
    assert running.state == "running"


def _last(scheduler: DecodeScheduler) -> tuple[Any, Any, float]:
    """Arguments of `finish` for the step that is under way."""
    from kvferry.schedule.step import StepPlan

    plan = StepPlan(tuple(s.step(1) for s in scheduler.under_way.newest))
    return plan, result_of(plan), 0.0


def test_nothing_is_preempted_for_a_seat_or_where_it_would_not_be_enough() -> None:
    scheduler = scheduler_of(max_num_seqs=1)
    old, fetching = sequence_of(4), sequence_of(4)
    scheduler.add(fetching, pull=True)
    scheduler.due(fetching.key)
    scheduler.plan(0.0)
    scheduler.add(old, pull=False)
    decision = scheduler.plan(0.0)
    assert not decision.dropped
    assert fetching.state == "fetching"


def test_memory_on_its_way_back_costs_nobody_else_his() -> None:
    scheduler = scheduler_of(num_blocks=7, watermark_blocks=0)
    old, young = sequence_of(7, max_tokens=14), sequence_of(7, max_tokens=14)
    pulled(scheduler, old)
    pulled(scheduler, young)
    leaving = sequence_of(7)
    scheduler.add(leaving, pull=True)
    scheduler.due(leaving.key)
    step(scheduler)
    scheduler.memory.pin(leaving)  # a scatter is under way
    scheduler.cancel(leaving.key)
    decision, _ = step(scheduler)
    assert not decision.dropped
    assert decision.plan is not None
    assert [s.sequence_id for s in decision.plan.steps] == [old.sequence_id], "the younger one waits for a block"
    assert scheduler.memory.unpin(leaving)
    decision, _ = step(scheduler)
    assert decision.plan is not None
    assert len(decision.plan.steps) == 2
    assert old.state == young.state == "running"


def test_what_could_never_reach_its_end_here_is_refused() -> None:
    scheduler = scheduler_of(num_blocks=4)
    assert scheduler.add(sequence_of(8, max_tokens=10), pull=False) == "too_long"
    assert scheduler.add(sequence_of(8, max_tokens=9), pull=False) is None
    assert scheduler.add(sequence_of(16, max_tokens=1), pull=False) == "too_long"


def test_deadlines_end_what_waits_and_what_opens_and_late_pulls_fail() -> None:
    scheduler = scheduler_of(pull_deadline_s=10.0, max_num_seqs=1)
    fetching = sequence_of(8)
    scheduler.add(fetching, pull=True)
    scheduler.due(fetching.key)
    scheduler.plan(0.0)
    opening, waiting = sequence_of(8, deadline=3.0), sequence_of(8, deadline=3.0)
    scheduler.add(opening, pull=True)
    scheduler.add(waiting, pull=False)
    assert {(d.sequence, d.reason) for d in scheduler.expire(3.0)} == {(opening, "deadline"), (waiting, "deadline")}
    assert [(d.sequence, d.reason) for d in scheduler.expire(10.0)] == [(fetching, "transfer_failed")]
    assert_all_free(scheduler.memory)


def test_a_sequence_that_must_run_alone_shares_no_step() -> None:
    scheduler = scheduler_of(num_blocks=20)
    alone, other = sequence_of(4, alone=True), sequence_of(4)
    pulled(scheduler, alone)
    pulled(scheduler, other)
    for _ in range(6):
        plan = scheduler.plan(0.0).plan
        assert plan is not None
        ids = {s.sequence_id for s in plan.steps}
        assert len(ids & {alone.sequence_id, other.sequence_id}) == 1
        scheduler.finish(plan, result_of(plan), 0.0)


def two_steps(scheduler: DecodeScheduler) -> tuple[StepPlan, StepPlan]:
    """The next step, and the one behind it."""
    plan, ahead = scheduler.plan(0.0).plan, scheduler.plan_ahead()
    assert plan is not None
    assert ahead is not None
    return plan, ahead


def test_the_step_behind_one_that_only_decodes_is_planned_on_the_token_that_is_being_drawn() -> None:
    scheduler = scheduler_of(num_blocks=20)
    sequence = sequence_of(7, max_tokens=20)
    pulled(scheduler, sequence)
    plan, ahead = two_steps(scheduler)
    assert scheduler.plan_ahead() is None, "one step ahead, and no more"
    [now_step], [then_step] = plan.steps, ahead.steps
    assert now_step.draw is not None
    assert now_step.draw.place is not None
    now_step.draw.place[0] = 9  # as the runner does
    assert (then_step.start, then_step.tokens.tolist()) == (now_step.start + 1, [9])
    assert len(then_step.block_table) * BLOCK >= then_step.start + 1
    assert then_step.draw is not None
    assert then_step.draw.index == now_step.draw.index + 1
    assert then_step.draw.tokens.tolist() == [*now_step.draw.tokens.tolist(), 9]
    [emission] = scheduler.finish(plan, result_of(plan, 9), 0.0)
    assert (emission.index, emission.token, emission.reason) == (1, 9, None)
    [emission] = scheduler.finish(ahead, result_of(ahead, 4), 0.0)
    assert (emission.index, emission.token, emission.reason) == (2, 4, None)
    assert sequence.tokens.tolist()[-2:] == [9, 4]
    assert sequence.num_computed == sequence.num_tokens - 1


def test_no_row_is_planned_for_a_sequence_that_ends_with_the_token_that_is_being_drawn() -> None:
    scheduler = scheduler_of(num_blocks=20)
    ending, going_on = sequence_of(4, max_tokens=3), sequence_of(4, max_tokens=4)
    pulled(scheduler, ending)
    pulled(scheduler, going_on)  # `ending` has drawn its second token meanwhile
    plan, ahead = two_steps(scheduler)
    assert [step.sequence_id for step in ahead.steps] == [going_on.sequence_id]
    assert [e.reason for e in scheduler.finish(plan, result_of(plan), 0.0)] == ["length", None]
    scheduler.finish(ahead, result_of(ahead), 0.0)
    last = scheduler.plan(0.0).plan
    assert last is not None
    assert scheduler.plan_ahead() is None, "nobody goes on"
    scheduler.finish(last, result_of(last), 0.0)
    assert_all_free(scheduler.memory)


def test_a_sequence_that_has_ended_all_the_same_gets_nothing_and_its_blocks_come_back_behind_the_step() -> None:
    scheduler = scheduler_of(num_blocks=20)
    sequence = sequence_of(4, max_tokens=10)
    pulled(scheduler, sequence)
    plan, ahead = two_steps(scheduler)
    assert [e.reason for e in scheduler.finish(plan, result_of(plan, 2), 0.0)] == ["stop"]
    assert scheduler.memory.pool.num_free < 20, "a step writes into them"
    assert scheduler.finish(ahead, result_of(ahead), 0.0) == []
    assert_all_free(scheduler.memory)


@pytest.mark.parametrize("why", ["waiting", "computing", "alone", "grammar", "no block", "not in the step"])
def test_nothing_is_planned_ahead_where_there_may_be_something_to_decide(why: str) -> None:
    scheduler = scheduler_of(num_blocks=4 if why == "no block" else 20, watermark_blocks=0)
    fields: dict[str, Any] = {"alone": why == "alone"}
    if why == "grammar":
        fields["sampling"] = Sampling(temperature=0.0, max_tokens=20, grammar=Grammar("regex", "a*"))
    sequence = sequence_of(7 if why == "no block" else 4, **fields)
    sequence.mask = mask_of(np.ones(64, np.bool_))
    pulled(scheduler, sequence)
    if why == "computing":
        scheduler.add(sequence_of(70), pull=False)
    assert scheduler.plan(0.0).plan is not None
    if why == "waiting":
        scheduler.add(sequence_of(4), pull=False)
    elif why == "not in the step":
        other = sequence_of(4)
        scheduler.add(other, pull=True)
        scheduler.due(other.key)
        scheduler.under_way.take_back()
        assert scheduler.plan(0.0).fetch == (other,)
        scheduler.fetched(other.key, 5, 0.0)
    elif why == "no block":
        scheduler.memory.pool.allocate(scheduler.memory.pool.num_free)
    pins = sequence.pins
    assert scheduler.plan_ahead() is None
    assert sequence.pins == pins
    assert len(scheduler.under_way) == 1


def test_a_step_that_is_taken_back_leaves_no_trace_but_a_block_that_the_next_one_needs() -> None:
    scheduler = scheduler_of(num_blocks=20)
    sequence = sequence_of(7, max_tokens=20)
    pulled(scheduler, sequence)
    plan = scheduler.plan(0.0).plan
    assert plan is not None
    assert scheduler.plan_ahead() is not None
    scheduler.under_way.take_back()
    assert sequence.pins == 1
    scheduler.finish(plan, result_of(plan), 0.0)
    assert sequence.pins == 0
    again = scheduler.plan(0.0).plan
    assert again is not None
    assert again.steps[0].start == 8
    scheduler.cancel(sequence.key)
    scheduler.finish(again, result_of(again), 0.0)
    assert_all_free(scheduler.memory)


def test_a_drain_hands_back_all_that_does_not_run_yet() -> None:
    scheduler = scheduler_of(num_blocks=20)
    running, opening, fetching, waiting = (sequence_of(4) for _ in range(4))
    pulled(scheduler, running)
    scheduler.add(fetching, pull=True)
    scheduler.due(fetching.key)
    step(scheduler)
    scheduler.add(opening, pull=True)
    scheduler.add(waiting, pull=False)
    assert {d.sequence for d in scheduler.drain()} == {opening, fetching, waiting}
    assert [d.sequence for d in scheduler.hand_over()] == [running]
    assert_all_free(scheduler.memory)


def test_an_urgent_prompt_is_prefilled_before_those_that_have_begun() -> None:
    scheduler = scheduler_of(num_blocks=30, max_num_batched_tokens=8)
    old, urgent = sequence_of(24), sequence_of(12, priority=-5)
    scheduler.add(old, pull=False)
    step(scheduler)
    scheduler.add(urgent, pull=False)
    started = []
    while len(started) < 2:
        _, emissions = step(scheduler)
        started += [emission.sequence for emission in emissions if emission.index == 0]
    assert started == [urgent, old]
