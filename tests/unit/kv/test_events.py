"""What a worker tells of its cache, batch by batch and as a whole."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.kv.events import CacheLog, KeyArray, pack_keys, unpack_keys
from kvferry.wire.cache_news import MAX_CACHE_KEYS, CacheSnapshot
from kvferry.wire.messages import Codecs


def block(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()[:16]


def column(*numbers: int) -> KeyArray:
    return np.sort(unpack_keys(pack_keys(map(block, numbers))))


def keys(column: bytes) -> set[int]:
    return set(unpack_keys(column).tolist())


def of(*numbers: int) -> set[int]:
    return keys(pack_keys(map(block, numbers)))


def test_a_batch_holds_what_happened_since_the_one_before() -> None:
    log = CacheLog(7)
    log.stored(block(1))
    log.stored(block(2))
    (first,) = log.batches()
    log.evicted(block(1))
    (second,) = log.batches()
    assert (first.incarnation, first.seq, keys(first.stored), keys(first.evicted)) == (7, 1, of(1, 2), set())
    assert (second.seq, keys(second.stored), keys(second.evicted)) == (2, set(), of(1))
    assert log.batches() == []
    assert log.seq == 2


def test_what_came_and_went_within_a_batch_is_not_told() -> None:
    log = CacheLog(7)
    log.stored(block(1))
    log.evicted(block(1))
    assert log.batches() == []
    assert log.seq == 0


def test_a_block_stored_twice_in_a_row_is_a_fault_of_the_caller() -> None:
    log = CacheLog(7)
    log.stored(block(1))
    with pytest.raises(AssertionError):
        log.stored(block(1))


def test_a_snapshot_has_the_number_of_the_last_batch_before_it() -> None:
    log = CacheLog(7)
    log.stored(block(3))
    (events,) = log.batches()
    (snapshot,) = log.snapshot(events.seq, column(1, 3))
    assert keys(events.stored) == of(3)
    assert (snapshot.seq, snapshot.part, snapshot.num_parts, keys(snapshot.keys)) == (1, 0, 1, of(1, 3))


def test_an_empty_cache_has_a_snapshot_of_one_part() -> None:
    (snapshot,) = CacheLog(7).snapshot(0, column())
    assert snapshot == CacheSnapshot(7, 0, 0, 1)


def test_a_large_snapshot_is_cut_into_parts_that_the_codec_takes() -> None:
    codec = Codecs().cache
    parts = list(CacheLog(7).snapshot(3, column(*range(MAX_CACHE_KEYS + 10))))
    assert [len(part.keys) for part in parts] == [8 * MAX_CACHE_KEYS, 80]
    assert [codec.decode(codec.encode(part)) for part in parts] == parts
    assert set().union(*(keys(part.keys) for part in parts)) == of(*range(MAX_CACHE_KEYS + 10))


def test_more_changes_than_a_message_holds_become_several_batches_that_the_codec_takes() -> None:
    log, codec = CacheLog(7), Codecs().cache
    for number in range(MAX_CACHE_KEYS + 1):
        log.stored(block(number))
    batches = log.batches()
    assert [batch.seq for batch in batches] == [1, 2]
    assert [codec.decode(codec.encode(batch)) for batch in batches] == batches


@given(st.lists(st.lists(st.integers(0, 5), max_size=8), max_size=8))
def test_batches_applied_in_order_give_the_cache_and_name_no_block_twice(rounds: list[list[int]]) -> None:
    log, cache, told = CacheLog(7), set[int](), set[int]()
    for toggled in rounds:
        for number in toggled:
            (log.evicted if number in cache else log.stored)(block(number))
            cache ^= {number}
        for batch in log.batches():
            stored, evicted = keys(batch.stored), keys(batch.evicted)
            assert not stored & evicted
            assert not stored & told, "told already"
            assert evicted <= told, "never told"
            told = (told | stored) - evicted
        assert told == of(*cache)
