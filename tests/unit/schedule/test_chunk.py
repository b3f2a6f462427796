"""The chunk budget keeps a step near its target time, at any context."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvferry.schedule.chunk import BAND_TOKENS, FIRST_TOKENS, MIN_RATE_TOKENS, STEP_TARGET_S, ChunkBudget


def test_before_anything_is_measured_the_budget_is_small_and_within_the_setting() -> None:
    assert ChunkBudget(512, 16).tokens() == FIRST_TOKENS
    assert ChunkBudget(4, 16).tokens() == 4
    assert ChunkBudget(512, 16).tokens(start=3 * BAND_TOKENS) == FIRST_TOKENS // 4


def test_a_slow_engine_gets_smaller_chunks_of_whole_blocks() -> None:
    budget = ChunkBudget(512, 16, target_s=0.3)
    budget.observe([(0, 512)], 1.024)  # 500 tokens a second
    assert budget.tokens() == 144  # 150, cut to blocks


def test_a_fast_engine_gets_no_more_than_the_setting() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, 512)], 0.01)
    assert budget.tokens() == 512
    odd = ChunkBudget(500, 16)
    odd.observe([(0, 500)], 0.01)
    assert odd.tokens() == 500


def test_the_budget_never_falls_under_one_block_or_the_setting() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, 512)], 1e6)
    assert budget.tokens() == 16
    tiny = ChunkBudget(4, 16)
    tiny.observe([(0, 512)], 1e6)
    assert tiny.tokens() == 4


def test_small_steps_and_impossible_times_teach_nothing() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, MIN_RATE_TOKENS - 1)], 100.0)
    budget.observe([(0, 512)], 0.0)
    budget.observe([], 1.0)
    assert budget.tokens_per_s == 0.0


def test_one_odd_step_moves_the_rate_only_in_part() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, 512)], 0.512)
    budget.observe([(0, 512)], 51.2)
    assert 500 < budget.tokens_per_s < 1000


def test_an_engine_that_was_slow_for_a_while_gets_long_chunks_again() -> None:
    budget = ChunkBudget(512, 16)
    for _ in range(20):
        budget.observe([(0, budget.tokens())], 10.0)
    assert budget.tokens() == 16  # fewer than a step of its own accord would teach from
    for _ in range(40):
        budget.observe([(0, budget.tokens())], budget.tokens() / 2000)
    assert budget.tokens() == 512


def test_a_budget_that_was_small_grows_although_short_steps_are_slow_for_each_row() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, 128)], 5.0)
    assert budget.tokens() == 16
    for _ in range(60):
        budget.observe([(0, budget.tokens())], 0.15 + 0.001 * budget.tokens())
    assert budget.tokens() in (144, 160)  # 0.15 s for the weights, as much for the rows


def test_a_band_of_context_that_was_never_measured_is_taken_to_be_slower_by_its_length() -> None:
    budget = ChunkBudget(4096, 1)
    budget.observe([(3 * BAND_TOKENS, 300)], 0.3)
    assert budget.tokens(start=3 * BAND_TOKENS) == budget.tokens(start=4 * BAND_TOKENS - 1) == 300
    assert budget.tokens(start=7 * BAND_TOKENS) == 150
    assert budget.tokens(start=0) == 300  # and one with less context for no slower
    budget.observe([(7 * BAND_TOKENS, 150)], 0.2)
    assert budget.tokens(start=7 * BAND_TOKENS) in (224, 225)
    assert budget.tokens(start=3 * BAND_TOKENS) == 300


def test_sequences_share_a_step_in_proportion_to_what_each_could_have_alone() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe([(0, 512)], 0.256)
    budget.observe([(4 * BAND_TOKENS, 64)], 0.3)
    step = budget.step()
    assert step.take(0, 256) == 256  # half of 512
    assert step.take(4 * BAND_TOKENS, 1000) == 32  # half of 64
    assert step.take(0, 1) == 0
    beside = budget.step(num_decoding=12)
    assert beside.take(0, 1000) == 500
    assert budget.step(num_decoding=1000).take(0, 10) == 1  # prefill is never starved


def test_a_step_of_several_sequences_teaches_each_of_their_bands() -> None:
    budget = ChunkBudget(4096, 1)
    budget.observe([(0, 300)], 0.3)
    budget.observe([(BAND_TOKENS, 100)], 0.2)
    for _ in range(40):
        budget.observe([(0, 100), (BAND_TOKENS, 100)], 0.6)  # twice as slow as both together
    assert budget.tokens(start=0) == pytest.approx(150, abs=2)
    assert budget.tokens(start=BAND_TOKENS) == pytest.approx(75, abs=2)


def longest_step(seconds_of: Callable[[int, int], float], prompts: list[tuple[int, int]]) -> float:
    """Of prompts as (cached prefix, end), computed one after the other."""
    budget, longest = ChunkBudget(512, 16), 0.0
    for start, end in prompts:
        while start < end:
            rows = budget.step().take(start, end - start)
            seconds = seconds_of(start, rows)
            longest = max(longest, seconds)
            budget.observe([(start, rows)], seconds)
            start += rows
    return longest


@pytest.mark.parametrize("per_row", [0.0006, 0.006])
def test_steps_stay_near_their_target_up_to_32k_of_context_and_when_prompts_change(per_row: float) -> None:
    """A model whose attention at 3,000 positions costs as much as its weights, on a fast and on a slow machine."""

    def seconds_of(start: int, rows: int) -> float:
        return per_row * rows * (1 + (start + rows / 2) / 3000)

    one_block = seconds_of(32_000, 16)
    bound = 1.35 * max(STEP_TARGET_S, one_block)
    assert longest_step(seconds_of, [(0, 32_000)]) < bound
    assert longest_step(seconds_of, [*[(0, 400)] * 20, (31_000, 31_500), (0, 400), (15_000, 32_000)]) < bound
    # A budget that knows no context is refuted: what it learns from short prompts is wrong for long ones.
    assert seconds_of(31_000, 512 if per_row < 0.001 else 48) > 2 * bound
