"""Decisions of a prefill worker."""

from __future__ import annotations

import numpy as np
from masks import mask_of
from sequences import BLOCK, assert_all_free, result_of, sequence_of

from kvferry.schedule.chunk import STEP_TARGET_S
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Dropped, ModelLimits
from kvferry.schedule.step import StepPlan
from kvferry.wire.sampling import Grammar, Sampling
from kvferry_prefill.scheduler import PrefillPolicy, PrefillScheduler

LEASE = 30.0


def scheduler_of(num_blocks: int = 10, rows: int = 64, max_waiting: int = 4) -> PrefillScheduler:
    policy = PrefillPolicy(max_waiting=max_waiting, max_num_batched_tokens=rows, overtake_s=0.5, lease_s=LEASE)
    return PrefillScheduler(KVMemory(num_blocks, BLOCK), ModelLimits(100, frozenset({2})), policy)


def step(scheduler: PrefillScheduler, now: float = 0.0, token: int = 5):
    decision = scheduler.plan(now)
    emissions = scheduler.finish(decision.plan, result_of(decision.plan, token), now) if decision.plan else []
    return decision, emissions


def test_a_prompt_is_computed_in_chunks_and_then_held_with_its_first_token() -> None:
    scheduler = scheduler_of(rows=8)
    sequence = sequence_of(20)
    assert scheduler.add(sequence) is None
    chunks = []
    while sequence.state != "held":
        decision, emissions = step(scheduler)
        assert decision.plan is not None
        chunks.append(decision.plan.num_tokens)
    assert chunks == [8, 8, 4]
    assert [(e.index, e.token, e.reason) for e in emissions] == [(0, 5, None)]
    assert scheduler.first_tokens == {sequence.key: 5}
    scheduler.cancel(sequence.key)
    assert_all_free(scheduler.memory)


def test_steps_of_a_slow_engine_stay_near_their_target_while_the_context_grows() -> None:
    length, per_row = 8000, 0.001  # seconds; as much again for every 2,000 positions of context

    def seconds_of(plan: StepPlan) -> float:
        return sum(per_row * len(part.tokens) * (1 + (part.start + len(part.tokens) / 2) / 2000) for part in plan.steps)

    policy = PrefillPolicy(max_waiting=4, max_num_batched_tokens=512, overtake_s=0.5, lease_s=LEASE)
    scheduler = PrefillScheduler(KVMemory(length // 2, BLOCK), ModelLimits(length + 10, frozenset({2})), policy)
    short, long = sequence_of(700, max_model_len=length + 10), sequence_of(length, max_model_len=length + 10)
    scheduler.add(short)
    taken: list[float] = []
    rows: list[int] = []
    while not scheduler.first_tokens or long.state != "held":
        plan = scheduler.plan(0.0).plan
        assert plan is not None
        taken.append(seconds_of(plan))
        rows.append(plan.num_tokens)
        scheduler.finish(plan, result_of(plan, seconds=taken[-1]), 0.0)
        if short.state == "held" and long.key not in scheduler.sequences:
            scheduler.add(long)
    assert max(taken) < 1.35 * STEP_TARGET_S
    assert sorted(taken)[len(taken) // 5] > 0.7 * STEP_TARGET_S, "steps are no shorter than they need be"
    assert max(rows) > 3 * rows[-2], "the chunk follows the context"


def test_a_prompt_is_computed_while_its_grammar_is_compiled_but_not_drawn_from() -> None:
    scheduler = scheduler_of(rows=8)
    sampling = Sampling(temperature=0.0, max_tokens=8, grammar=Grammar("regex", "a"))
    waiting, other = sequence_of(10, sampling=sampling), sequence_of(4)
    scheduler.add(waiting)
    assert [step(scheduler)[0].plan.num_tokens for _ in range(2)] == [8, 1]
    assert step(scheduler)[0].plan is None, "the last row would draw"
    scheduler.add(other)
    decision, _ = step(scheduler)
    assert [part.sequence_id for part in decision.plan.steps] == [other.sequence_id], "it holds nobody up"
    waiting.mask = mask_of(np.ones(32, np.bool_))
    decision, emissions = step(scheduler)
    assert decision.plan.num_tokens == 1
    assert decision.plan.steps[0].draw.mask is waiting.mask
    assert [emission.sequence for emission in emissions] == [waiting]


def test_a_first_token_that_ends_the_sequence_is_never_held() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence_of(20))
    _, emissions = step(scheduler, token=2)
    assert emissions[0].reason == "stop"
    assert not scheduler.sequences
    assert not scheduler.first_tokens
    assert_all_free(scheduler.memory)


def test_what_fits_no_pool_or_no_context_is_refused_and_so_is_one_too_many() -> None:
    scheduler = scheduler_of(num_blocks=10, max_waiting=1)
    assert scheduler.add(sequence_of(41)) == "too_long"
    assert scheduler_of(num_blocks=100).add(sequence_of(100)) == "too_long"
    assert scheduler.add(sequence_of(4)) is None
    assert scheduler.add(sequence_of(4)) == "queue_full"


def test_a_full_queue_gives_up_its_last_of_a_lower_priority_and_never_one_of_its_own() -> None:
    scheduler = scheduler_of(max_waiting=3)
    normal, background, last = sequence_of(4), sequence_of(4, priority=2), sequence_of(4, priority=2)
    for sequence in (normal, last, background):
        scheduler.add(sequence)
    older = sequence_of(4, priority=2, arrival=-1.0)
    assert scheduler.displace(older) is None, "age displaces nobody"
    for urgent, victim in ((sequence_of(4), last), (sequence_of(4, priority=-1), background)):
        assert scheduler.add(urgent) == "queue_full"
        assert scheduler.displace(urgent) == Dropped(victim, "preempted")
        assert scheduler.add(urgent) is None
    assert scheduler.displace(sequence_of(4)) is None


def test_an_older_request_takes_back_younger_held_kv_and_a_younger_one_waits() -> None:
    scheduler = scheduler_of()
    old, young = sequence_of(24), sequence_of(24)
    scheduler.add(young)
    step(scheduler)
    scheduler.add(old)
    decision, _ = step(scheduler)
    assert [(d.sequence, d.reason) for d in decision.dropped] == [(young, "preempted")]
    assert old.state == "held"
    younger = sequence_of(24)
    scheduler.add(younger)
    decision, _ = step(scheduler)
    assert decision.plan is None
    assert not decision.dropped
    assert younger.state == "waiting"


def test_kv_with_an_open_pull_is_taken_back_last() -> None:
    scheduler = scheduler_of()
    old, opened, parked = sequence_of(16), sequence_of(16), sequence_of(16)
    scheduler.has_open = lambda key: key == parked.key  # the youngest of all has the open pull
    for sequence in (opened, parked):
        scheduler.add(sequence)
    step(scheduler)
    scheduler.add(old)
    decision, _ = step(scheduler)
    assert [d.sequence for d in decision.dropped] == [opened]


def test_nothing_is_taken_back_where_all_of_it_would_not_be_enough() -> None:
    scheduler = scheduler_of()
    oldest, old, young = sequence_of(16), sequence_of(32), sequence_of(16)
    scheduler.add(oldest)
    scheduler.add(young)
    step(scheduler)
    scheduler.add(old)
    decision, _ = step(scheduler)
    assert not decision.dropped
    assert young.state == "held"


def test_a_shared_prefix_counts_before_anything_is_taken_back() -> None:
    scheduler = scheduler_of()
    old = sequence_of(range(36))
    young = sequence_of(range(36))
    scheduler.add(young)
    step(scheduler)
    scheduler.add(old)
    decision, _ = step(scheduler)
    assert not decision.dropped, "nine blocks are shared; only the tail is new, and one block is free"
    assert old.cached_tokens == 32


def test_a_lease_runs_out_unless_an_open_pull_renews_it() -> None:
    scheduler = scheduler_of()
    kept, lost = sequence_of(8), sequence_of(8)
    for sequence in (kept, lost):
        scheduler.add(sequence)
    step(scheduler)
    scheduler.has_open = lambda key: key == kept.key
    assert scheduler.expire(LEASE - 0.1) == []
    assert [(d.sequence, d.reason) for d in scheduler.expire(LEASE)] == [(lost, "expired")]
    assert scheduler.expire(LEASE + 1) == []
    scheduler.hold_again(kept.key, LEASE + 5)
    scheduler.has_open = lambda key: False
    assert scheduler.expire(2 * LEASE + 4) == []
    assert [d.sequence for d in scheduler.expire(2 * LEASE + 5)] == [kept]
    assert_all_free(scheduler.memory)


def test_a_deadline_ends_what_waits_also_when_no_step_is_planned() -> None:
    scheduler = scheduler_of()
    scheduler.add(sequence_of(24))
    step(scheduler)
    late = sequence_of(24, deadline=3.0)
    scheduler.add(late)
    step(scheduler)
    assert scheduler.expire(2.9) == []
    assert [(d.sequence, d.reason) for d in scheduler.expire(3.0)] == [(late, "deadline")]


def test_a_cancel_during_the_step_frees_at_its_end_and_emits_nothing() -> None:
    scheduler = scheduler_of()
    sequence = sequence_of(20)
    scheduler.add(sequence)
    decision = scheduler.plan(0.0)
    assert scheduler.cancel(sequence.key) is sequence
    assert sequence.doomed
    assert decision.plan is not None
    assert scheduler.finish(decision.plan, result_of(decision.plan), 0.0) == []
    assert_all_free(scheduler.memory)
    assert scheduler.plan(0.0).plan is None


def test_a_failed_step_costs_its_own_sequences_and_no_other() -> None:
    scheduler = scheduler_of(rows=8)
    failing, waiting = sequence_of(8), sequence_of(8)
    scheduler.add(failing)
    scheduler.add(waiting)
    scheduler.plan(0.0)
    assert [(d.sequence, d.reason) for d in scheduler.abandon_step("RuntimeError")] == [(failing, "error")]
    _, emissions = step(scheduler)
    assert emissions[0].sequence is waiting


def test_a_drain_hands_back_what_has_not_begun_and_then_everything() -> None:
    scheduler = scheduler_of()
    begun, waiting = sequence_of(32), sequence_of(32)
    scheduler.add(begun)
    scheduler.add(waiting)
    step(scheduler)
    assert [d.sequence for d in scheduler.drain()] == [waiting]
    assert [d.sequence for d in scheduler.hand_over()] == [begun]
    assert_all_free(scheduler.memory)


def test_the_expected_end_counts_what_computes_ahead() -> None:
    scheduler = scheduler_of(rows=32)
    first, second = sequence_of(32), sequence_of(8)
    scheduler.add(first)
    assert scheduler.expected_s(first) == 0.0, "unknown until a step was measured"
    decision = scheduler.plan(0.0)
    assert decision.plan is not None
    scheduler.add(second)
    scheduler.finish(decision.plan, result_of(decision.plan, seconds=1.0), 0.0)
    scheduler.plan(0.0)
    assert scheduler.expected_s(first) == 0.0
    assert scheduler.expected_s(second) == 0.25


def test_an_urgent_prompt_is_computed_before_those_that_have_begun_and_equals_keep_their_order() -> None:
    scheduler = scheduler_of(num_blocks=30, rows=8)
    background, old = sequence_of(24, priority=1), sequence_of(20)
    for sequence in (old, background):
        scheduler.add(sequence)
    assert step(scheduler)[0].sequences == (old,)
    young, urgent = sequence_of(8), sequence_of(12, priority=-5)
    for sequence in (young, urgent):
        scheduler.add(sequence)
    computed = []
    while len(scheduler.first_tokens) < 4:
        decision, _ = step(scheduler)
        computed += [sequence for sequence in decision.sequences if sequence not in computed]
    assert computed == [urgent, old, young, background]
    assert scheduler.expected_s(background) == 0.0


def test_what_is_expected_of_a_prompt_counts_what_goes_before_it_alone() -> None:
    scheduler = scheduler_of(num_blocks=30, rows=8)
    first, second, urgent = sequence_of(24), sequence_of(20), sequence_of(12, priority=-5)
    for sequence in (first, second):
        scheduler.add(sequence)
    step(scheduler)
    scheduler.add(urgent)
    step(scheduler)
    rate = scheduler.chunk.tokens_per_s
    expected = [scheduler.expected_s(sequence) * rate for sequence in (urgent, first, second)]
    assert [round(tokens) for tokens in expected] == [4, 20, 40]
