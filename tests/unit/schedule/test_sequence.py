"""One sequence: indices, rows, draws, hashes and ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sequences import BLOCK, KV, sequence_of

from kvferry.kv.hashing import block_hashes, chain_hash, root_hash
from kvferry.schedule.sequence import ModelLimits, pick_alone

LIMITS = ModelLimits(max_model_len=100, eos_token_ids=frozenset({2}))


def test_indices_count_the_generated_tokens_of_all_attempts() -> None:
    sequence = sequence_of([1, 2, 3], generated=[7, 8])
    assert sequence.num_context == 5
    assert sequence.next_index == 2
    sequence.append_token(9)
    assert sequence.next_index == 3
    assert sequence.tokens.tolist() == [1, 2, 3, 7, 8, 9]


def test_only_the_chunk_that_reaches_the_end_draws() -> None:
    sequence = sequence_of(10)
    assert sequence.step(6).draw is None
    sequence.num_computed = 6
    step = sequence.step(4)
    assert step.start == 6
    assert step.draw is not None
    assert step.draw.index == 0


def test_a_draw_sees_prompt_and_generated_tokens_apart_and_copies_neither() -> None:
    sequence = sequence_of([1, 2, 3], generated=[7, 8])
    sequence.append_token(9)
    draw = sequence.step(6).draw
    assert draw is not None
    assert draw.tokens[: draw.num_prompt].tolist() == [1, 2, 3]
    assert draw.tokens[draw.num_prompt :].tolist() == [7, 8, 9]
    assert np.shares_memory(draw.tokens, sequence.tokens)


def test_views_given_to_the_engine_do_not_change_when_tokens_are_appended() -> None:
    sequence = sequence_of(4)
    rows = sequence.step(4).tokens
    before = rows.copy()
    sequence.append_token(9)
    assert np.array_equal(rows, before)


@given(st.integers(1, 30), st.lists(st.integers(0, 250), max_size=20))
def test_hashes_grow_as_if_the_whole_text_had_been_hashed_at_once(length: int, drawn: list[int]) -> None:
    sequence = sequence_of(length, max_tokens=len(drawn) + 1)
    for token in drawn:
        sequence.append_token(token)
    root = root_hash(KV.format_id, "", b"")
    assert sequence.hashes == block_hashes(root, sequence.tokens, BLOCK)
    for end in range(sequence.num_tokens + 1):
        assert sequence.chain_hash(end) == chain_hash(root, sequence.tokens, BLOCK, end)


@pytest.mark.parametrize(
    ("max_tokens", "ignore_eos", "token", "reason"),
    [(8, False, 2, "stop"), (8, True, 2, None), (1, False, 5, "length"), (1, False, 2, "stop"), (8, False, 5, None)],
)
def test_a_sequence_ends_by_eos_or_length(max_tokens: int, ignore_eos: bool, token: int, reason: str | None) -> None:
    from kvferry.wire.sampling import Sampling

    sequence = sequence_of(4, sampling=Sampling(max_tokens=max_tokens, ignore_eos=ignore_eos))
    sequence.append_token(token)
    assert sequence.end_reason(token, LIMITS) == reason


def test_the_context_length_ends_a_sequence() -> None:
    sequence = sequence_of(99, max_model_len=100, max_tokens=50)
    sequence.append_token(5)
    assert sequence.end_reason(5, LIMITS) == "length"


def test_a_sequence_that_runs_alone_shares_no_step_and_starves_nobody() -> None:
    alone, other, third = sequence_of(4, alone=True), sequence_of(4), sequence_of(4)
    picked = [pick_alone([other, alone, third], turn) for turn in range(4)]
    assert picked == [[alone], [other, third], [alone], [other, third]]
    assert pick_alone([other, third], 0) == [other, third]
    second = sequence_of(4, alone=True)
    assert [pick_alone([alone, second], turn)[0] for turn in (0, 2)] == [alone, second]
