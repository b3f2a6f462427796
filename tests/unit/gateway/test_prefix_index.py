"""The index equals what its workers have, whatever the bus did to their events."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from kvferry.kv.events import CacheLog, pack_keys, unpack_keys
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot
from kvferry_gateway.placement.prefix_index import MAX_EARLY, Heard, PrefixIndex, index_keys


def block(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "big")).digest()[:16]


def column(*numbers: int) -> bytes:
    return pack_keys(map(block, numbers))


def keys(*numbers: int) -> list[int]:
    return index_keys(column(*numbers))


def stored(incarnation: int, seq: int, *numbers: int) -> CacheEvents:
    return CacheEvents(incarnation, seq, column(*numbers))


@pytest.fixture
def index() -> PrefixIndex:
    index = PrefixIndex()
    index.attach(7, "p0", 100)
    index.attach(8, "p1", 100)
    return index


def depths(index: PrefixIndex, *numbers: int) -> list[int]:
    found: list[int] = index.depths(keys(*numbers)).tolist()
    return found


def test_each_worker_s_longest_prefix_is_found_and_a_hole_ends_it(index: PrefixIndex) -> None:
    index.apply(stored(7, 1, 1, 2, 3))
    index.apply(stored(8, 1, 1, 3, 4))
    assert depths(index, 1, 2, 3, 4) == [3, 1]
    assert depths(index, 3, 4) == [1, 2]
    assert depths(index, 9, 1) == [0, 0]
    assert depths(index) == [0, 0]


def test_a_prefix_that_very_many_workers_have_is_found_on_each_of_them() -> None:
    index = PrefixIndex()
    for worker in range(200):
        index.attach(worker, f"p{worker}", 10)
        index.apply(stored(worker, 1, *([1, 2] if worker % 3 else [1])))
    assert depths(index, 1, 2, 3) == [2 if worker % 3 else 1 for worker in range(200)]
    index.check_integrity()


def test_a_doubled_batch_is_ignored(index: PrefixIndex) -> None:
    assert index.apply(stored(7, 1, 1)) is Heard.APPLIED
    index.apply(CacheEvents(7, 2, b"", column(1)))
    assert index.apply(stored(7, 1, 1)) is Heard.OLD
    assert depths(index, 1) == [0, 0]


def test_a_batch_that_overtook_waits_for_the_one_before_it(index: PrefixIndex) -> None:
    assert index.apply(CacheEvents(7, 2, b"", column(1))) is Heard.GAP
    assert index.apply(stored(7, 1, 1, 2)) is Heard.APPLIED
    assert depths(index, 2) == [1, 0]
    assert depths(index, 1) == [0, 0], "evicted by the batch that came first"


def test_after_a_gap_a_snapshot_and_the_batches_that_follow_it_put_things_right(index: PrefixIndex) -> None:
    index.apply(stored(7, 1, 1))
    index.apply(stored(7, 4, 4))
    index.apply(stored(7, 3, 3))
    assert depths(index, 3) == [0, 0]
    assert index.load(CacheSnapshot(7, 2, 0, 1, column(2))) is Heard.APPLIED
    assert [depths(index, number)[0] for number in (1, 2, 3, 4)] == [0, 1, 1, 1]
    index.check_integrity()


def test_a_snapshot_counts_only_when_all_its_parts_are_there(index: PrefixIndex) -> None:
    index.apply(stored(7, 2, 9))
    assert index.load(CacheSnapshot(7, 3, 1, 2, column(2))) is Heard.PARTIAL
    assert index.load(CacheSnapshot(7, 3, 1, 2, column(2))) is Heard.PARTIAL
    assert depths(index, 2) == [1, 0], "its blocks may be used already"
    assert index.is_behind(7, 3) is False
    assert index.is_behind(7, 3), "but it is not complete"
    assert index.load(CacheSnapshot(7, 4, 0, 2, column(5))) is Heard.PARTIAL, "a newer one begins anew"
    assert index.load(CacheSnapshot(7, 3, 0, 2, column(1))) is Heard.OLD
    assert index.load(CacheSnapshot(7, 4, 1, 2, column(6))) is Heard.APPLIED
    assert depths(index, 5, 6) == [2, 0]
    assert depths(index, 2) == [0, 0], "what the complete one lacks is gone"
    index.check_integrity()


def test_the_heartbeat_tells_of_a_lost_last_batch_one_beat_later(index: PrefixIndex) -> None:
    index.apply(stored(7, 1, 1))
    assert not index.is_behind(7, 1)
    assert not index.is_behind(7, 2), "the heartbeat may have overtaken it"
    assert index.is_behind(7, 2)
    assert index.is_behind(7, 2), "asked again until it is cured"
    index.load(CacheSnapshot(7, 2, 0, 1, column(1, 2)))
    assert not index.is_behind(7, 2)


def test_a_restarted_worker_keeps_nothing_of_its_predecessor(index: PrefixIndex) -> None:
    index.apply(stored(7, 1, 1, 2))
    index.apply(stored(8, 1, 1))
    index.detach(7)
    slot = index.attach(9, "p0", 100)
    assert slot == 0, "given again"
    assert index.depths(keys(1, 2))[slot] == 0
    assert index.apply(stored(7, 2, 3)) is Heard.UNKNOWN
    assert index.load(CacheSnapshot(7, 2, 0, 1, column(3))) is Heard.UNKNOWN
    assert index.num_blocks(8) == 1
    assert len(index) == 1
    index.check_integrity()


def test_two_workers_of_one_name_keep_what_each_has(index: PrefixIndex) -> None:
    index.apply(stored(7, 1, 1, 2))
    slot = index.attach(9, "p0", 100)
    index.apply(stored(9, 1, 1))
    assert depths(index, 1, 2) == [2, 0, 1]
    assert slot == 2


def test_a_worker_that_claims_more_blocks_than_it_can_have_is_not_believed(index: PrefixIndex) -> None:
    index.attach(9, "p2", 2)
    assert index.apply(stored(9, 1, 1, 2, 3)) is Heard.REFUSED
    assert index.num_blocks(9) == 0
    assert index.load(CacheSnapshot(9, 2, 0, 1, column(1, 2, 3))) is Heard.REFUSED
    assert index.load(CacheSnapshot(9, 2, 5, 3, column(1))) is Heard.REFUSED
    assert index.load(CacheSnapshot(9, 3, 0, 1, column(1, 2))) is Heard.APPLIED
    index.check_integrity()


def test_early_batches_are_bounded(index: PrefixIndex) -> None:
    for seq in range(2, 10 * MAX_EARLY):
        assert index.apply(stored(7, seq, seq)) is Heard.GAP
    assert index.load(CacheSnapshot(7, 10 * MAX_EARLY - 2, 0, 1, column(1))) is Heard.APPLIED
    assert depths(index, 10 * MAX_EARLY - 1) == [1, 0], "the newest were kept"
    assert depths(index, 2) == [0, 0]


def test_a_worker_that_stores_and_evicts_for_ever_takes_no_more_memory(index: PrefixIndex) -> None:
    for seq in range(1, 500):
        index.apply(CacheEvents(7, seq, column(seq), column(seq - 1)))
        index.check_integrity()
    index.detach(7)
    assert len(index) == 0


class LossyBus(RuleBasedStateMachine):
    """Two workers behind a bus that loses, doubles and reorders; both may restart. The model is their caches."""

    index_type = PrefixIndex

    @initialize()
    def start(self) -> None:
        self.index = self.index_type()
        self.incarnation = [10, 20]
        self.logs = [CacheLog(10), CacheLog(20)]
        self.caches: list[set[int]] = [set(), set()]
        self.bus: list[CacheEvents | CacheSnapshot] = []
        for worker in (0, 1):
            self.index.attach(self.incarnation[worker], f"p{worker}", 100)

    workers = st.integers(0, 1)

    @rule(worker=workers, number=st.integers(0, 7))
    def change(self, worker: int, number: int) -> None:
        log, cache = self.logs[worker], self.caches[worker]
        (log.evicted if number in cache else log.stored)(block(number))
        cache ^= {number}

    @rule(worker=workers)
    def publish(self, worker: int) -> None:
        self.bus += self.logs[worker].batches()

    @rule(worker=workers)
    def publish_snapshot(self, worker: int) -> None:
        self.bus += self.snapshot(worker)

    @rule(data=st.data(), kept=st.booleans())
    def deliver_any(self, data: Any, kept: bool) -> None:
        """In any order, and once more later if it is kept."""
        if self.bus:
            place = data.draw(st.integers(0, len(self.bus) - 1))
            self.hear(self.bus[place] if kept else self.bus.pop(place))

    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        if self.bus:
            self.bus.pop(data.draw(st.integers(0, len(self.bus) - 1)))

    @rule(worker=workers)
    def restart(self, worker: int) -> None:
        self.index.detach(self.incarnation[worker])
        self.incarnation[worker] += 1
        self.logs[worker] = CacheLog(self.incarnation[worker])
        self.caches[worker] = set()
        self.index.attach(self.incarnation[worker], f"p{worker}", 100)

    @rule(late=st.booleans())
    def settle(self, late: bool) -> None:
        """Heartbeats go on, and a bus that works again lets whoever is behind catch up."""
        if not late:
            self.bus.clear()
        for worker in (0, 1):
            incarnation, log = self.incarnation[worker], self.logs[worker]
            self.bus += log.batches()
            if not late:
                self.bus.clear()  # even the last batch
            self.index.is_behind(incarnation, log.seq)
            if self.index.is_behind(incarnation, log.seq):
                for message in self.snapshot(worker):
                    self.hear(message)
            for message in list(self.bus):
                self.hear(message)
            slot = self.index.attach(incarnation, f"p{worker}", 100)
            for number in range(8):
                found = self.index.depths(keys(number))[slot]
                assert bool(found) == (number in self.caches[worker]), f"block {number} of worker {worker}"
            assert self.index.num_blocks(incarnation) == len(self.caches[worker])

    def snapshot(self, worker: int) -> list[CacheEvents | CacheSnapshot]:
        log = self.logs[worker]
        due = log.batches()
        keys = np.sort(unpack_keys(pack_keys(map(block, self.caches[worker]))))
        return [*due, *log.snapshot(log.seq, keys)]

    def hear(self, message: CacheEvents | CacheSnapshot) -> None:
        if isinstance(message, CacheEvents):
            self.index.apply(message)
        else:
            self.index.load(message)

    @invariant()
    def integrity(self) -> None:
        if hasattr(self, "index"):
            self.index.check_integrity()


THOROUGH = settings(max_examples=150, stateful_step_count=30)
TestLossyBus = LossyBus.TestCase
TestLossyBus.settings = THOROUGH


class Credulous(PrefixIndex):
    """Takes every batch for the next one."""

    def apply(self, events: CacheEvents) -> Heard:
        worker = self._workers.get(events.incarnation)
        return super().apply(events if worker is None else msgspec.structs.replace(events, seq=worker.seq + 1))


def test_an_index_that_ignores_the_numbers_is_found_out() -> None:
    class CredulousBus(LossyBus):
        index_type = Credulous

    with pytest.raises(AssertionError):
        run_state_machine_as_test(
            CredulousBus, settings=settings(THOROUGH, max_examples=1000, report_multiple_bugs=False)
        )
