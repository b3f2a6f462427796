"""Admission: oldest first, and younger ones pass a blocked one only for a while."""

from __future__ import annotations

from collections.abc import Callable

from sequences import sequence_of

from kvferry.schedule.queue import AdmissionQueue
from kvferry.schedule.sequence import Sequence


def never(_: Sequence) -> bool:
    return False


def offering(taken: list[Sequence], *refused: Sequence) -> Callable[[Sequence], bool]:
    def admit(sequence: Sequence) -> bool:
        if sequence in refused:
            return False
        taken.append(sequence)
        return True

    return admit


def test_the_order_is_priority_then_arrival_then_ticket_whatever_the_order_of_adding() -> None:
    urgent = sequence_of(4, priority=-1, arrival=9.0)
    early = sequence_of(4, arrival=1.0)
    tie_low, tie_high = sequence_of(4, arrival=2.0, ticket=b"a" * 16), sequence_of(4, arrival=2.0, ticket=b"b" * 16)
    queue = AdmissionQueue(0.5)
    for sequence in (tie_high, early, tie_low, urgent):
        queue.add(sequence)
    taken: list[Sequence] = []
    assert queue.admit(0.0, offering(taken), never) == 4
    assert taken == [urgent, early, tie_low, tie_high]
    assert len(queue) == 0


def test_a_younger_one_passes_a_blocked_one_within_the_overtake_window_and_not_after() -> None:
    queue = AdmissionQueue(0.5)
    big, small, late = sequence_of(40), sequence_of(4), sequence_of(4)
    queue.add(big)
    queue.add(small)
    taken: list[Sequence] = []
    assert queue.admit(10.0, offering(taken, big), never) == 1
    assert taken == [small]
    queue.add(late)
    assert queue.admit(10.5, offering(taken, big), never) == 0, "the window counts from the first block"
    assert list(queue) == [big, late]
    assert queue.admit(10.6, offering(taken), never) == 2
    assert taken == [small, big, late]
    assert big.blocked_since is None


def test_without_a_window_nobody_overtakes() -> None:
    queue = AdmissionQueue(0.0)
    big, small = sequence_of(40), sequence_of(4)
    queue.add(big)
    queue.add(small)
    assert queue.admit(1.0, offering([], big), never) == 0


def test_memory_is_reclaimed_for_the_first_blocked_one_alone() -> None:
    queue = AdmissionQueue(0.5)
    first, second = sequence_of(40), sequence_of(40)
    queue.add(first)
    queue.add(second)
    asked: list[Sequence] = []

    def reclaim(sequence: Sequence) -> bool:
        asked.append(sequence)
        return False

    queue.admit(0.0, never, reclaim)
    assert asked == [first]


def test_what_is_removed_is_not_offered() -> None:
    queue = AdmissionQueue(0.5)
    gone, stays = sequence_of(4), sequence_of(4)
    queue.add(gone)
    queue.add(stays)
    assert queue.remove(gone.key) is gone
    assert queue.remove(gone.key) is None
    taken: list[Sequence] = []
    queue.admit(0.0, offering(taken), never)
    assert taken == [stays]
