"""The chunk budget keeps a step near its target time."""

from __future__ import annotations

from kvferry.schedule.chunk import FIRST_TOKENS, MIN_RATE_TOKENS, ChunkBudget


def test_before_anything_is_measured_the_budget_is_small_and_within_the_setting() -> None:
    assert ChunkBudget(512, 16).tokens == FIRST_TOKENS
    assert ChunkBudget(4, 16).tokens == 4


def test_a_slow_engine_gets_smaller_chunks_of_whole_blocks() -> None:
    budget = ChunkBudget(512, 16, target_s=0.3)
    budget.observe(512, 1.024)  # 500 tokens a second
    assert budget.tokens == 144  # 150, cut to blocks


def test_a_fast_engine_gets_no_more_than_the_setting() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe(512, 0.01)
    assert budget.tokens == 512


def test_the_budget_never_falls_under_one_block_or_the_setting() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe(512, 1e6)
    assert budget.tokens == 16
    tiny = ChunkBudget(4, 16)
    tiny.observe(512, 1e6)
    assert tiny.tokens == 4


def test_small_steps_and_impossible_times_teach_nothing() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe(MIN_RATE_TOKENS - 1, 100.0)
    budget.observe(512, 0.0)
    assert budget.tokens_per_s == 0.0


def test_one_odd_step_moves_the_rate_only_in_part() -> None:
    budget = ChunkBudget(512, 16)
    budget.observe(512, 0.512)
    budget.observe(512, 51.2)
    assert 500 < budget.tokens_per_s < 1000
