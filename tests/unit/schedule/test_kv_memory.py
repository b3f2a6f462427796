"""Reservations are all or nothing, and blocks come free only when nobody uses them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sequences import BLOCK, assert_all_free, sequence_of

from kvferry.kv.ledger import BlockState
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Sequence


def reserve(memory: KVMemory, sequence: Sequence, extra: int = 0, watermark: int = 0) -> bool:
    wanted = sequence.num_context + extra
    return memory.reserve(sequence, wanted, sequence.num_context - 1, BlockState.RUNNING, 0.0, watermark=watermark)


def test_a_reservation_that_does_not_fit_changes_nothing() -> None:
    memory = KVMemory(4, BLOCK)
    first, second = sequence_of(10), sequence_of(6)
    assert reserve(memory, first)
    before = (memory.pool.ref_counts.tolist(), memory.ledger.rows(0.0), memory.queried_tokens)
    assert not reserve(memory, second)
    assert (memory.pool.ref_counts.tolist(), memory.ledger.rows(0.0), memory.queried_tokens) == before
    assert second.num_blocks == 0
    assert memory.free(first)
    assert reserve(memory, second)
    memory.free(second)
    assert_all_free(memory)


def test_the_watermark_stays_free() -> None:
    memory = KVMemory(4, BLOCK)
    sequence = sequence_of(12)
    assert not reserve(memory, sequence, watermark=2)
    assert reserve(memory, sequence, watermark=1)
    assert memory.pool.num_free == 1


def test_a_published_prefix_is_hit_by_the_next_reservation_up_to_its_bound() -> None:
    memory = KVMemory(8, BLOCK)
    first = sequence_of(range(12))
    reserve(memory, first)
    first.num_computed = 12
    memory.publish(first, 12)
    again = sequence_of(range(12))
    reserve(memory, again)
    assert again.cached_tokens == again.num_computed == 8, "the last token is never a hit"
    assert list(again.block_table[:2]) == list(first.block_table[:2])
    assert memory.hit_tokens == 8
    memory.free(first)
    memory.free(again)
    assert_all_free(memory)


def test_blocks_in_use_by_a_step_are_freed_when_it_ends_and_not_before() -> None:
    memory = KVMemory(4, BLOCK)
    sequence = sequence_of(10)
    reserve(memory, sequence)
    memory.pin(sequence)
    memory.pin(sequence)
    assert not memory.free(sequence)
    assert not memory.free(sequence)
    assert sequence.doomed
    assert memory.pool.num_free == 1
    assert memory.num_doomed == 3
    assert not memory.unpin(sequence)
    assert memory.unpin(sequence)
    assert not sequence.doomed
    assert_all_free(memory)


def test_unpinning_more_often_than_pinning_is_a_bug_that_shows() -> None:
    with pytest.raises(AssertionError, match="unpinned"):
        KVMemory(4, BLOCK).unpin(sequence_of(4))


def test_growth_adds_a_block_only_when_the_next_token_needs_one() -> None:
    memory = KVMemory(2, BLOCK)
    sequence = sequence_of(3)
    reserve(memory, sequence, extra=1)
    sequence.append_token(9)
    assert memory.grow(sequence)
    assert sequence.num_blocks == 1
    sequence.append_token(9)
    assert memory.grow(sequence)
    assert sequence.num_blocks == 2
    for _ in range(4):
        sequence.append_token(9)
    assert not memory.grow(sequence)
    assert sequence.num_blocks == 2


@given(st.lists(st.integers(1, 30), max_size=5), st.integers(1, 30), st.integers(0, 3), st.booleans())
def test_lacking_is_zero_exactly_when_a_reservation_would_succeed(
    held: list[int], wanted: int, watermark: int, shared: bool
) -> None:
    memory = KVMemory(12, BLOCK)
    for length in held:
        sequence = sequence_of(range(length))
        if reserve(memory, sequence):
            sequence.num_computed = length
            memory.publish(sequence, length)
            if length % 2:
                memory.free(sequence)
    asked = sequence_of(range(wanted)) if shared else sequence_of(wanted)
    lacking = memory.lacking(asked, wanted, wanted - 1, watermark)
    assert (lacking == 0) == reserve(memory, asked, watermark=watermark)
    memory.check_integrity()


def test_blocks_on_their_way_back_are_not_asked_for_again() -> None:
    memory = KVMemory(4, BLOCK)
    leaving, coming = sequence_of(16), sequence_of(8)
    reserve(memory, leaving)
    assert memory.lacking(coming, 8, 7) == 2
    memory.pin(leaving)
    memory.free(leaving)
    assert memory.lacking(coming, 8, 7) == 0
    assert not reserve(memory, coming)


def test_a_leaked_block_fails_the_check() -> None:
    memory = KVMemory(4, BLOCK)
    memory.pool.allocate(1)
    with pytest.raises(AssertionError):
        memory.check_integrity()
