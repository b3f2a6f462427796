"""Which attempts are served, and that what is remembered stays bounded."""

from __future__ import annotations

from dataclasses import dataclass

from sequences import GATEWAY, work_of

from kvferry.worker.fences import MAX_FENCES, MAX_TOMBSTONES, TOMBSTONE_S, Fences


@dataclass
class Books:
    live: int
    buried: int
    ended: int
    units: int


def books(fences: Fences) -> Books:
    return Books(len(fences._live), len(fences._buried), len(fences._ended), len(fences._units))


def test_a_repeat_is_known_while_the_attempt_lives_and_for_a_while_after_its_end() -> None:
    fences = Fences()
    work = work_of(4)
    assert not fences.is_repeat(work)
    assert fences.accept(work) is None
    assert fences.is_repeat(work)
    fences.end(work, 10.0)
    assert fences.is_repeat(work)
    assert fences.check(work) is None
    fences.expire(10.0 + TOMBSTONE_S)
    assert not fences.is_repeat(work)
    assert books(fences) == Books(0, 0, 0, 0)


def test_a_cancelled_attempt_is_refused_until_its_tombstone_expires() -> None:
    fences = Fences()
    work, early = work_of(4), work_of(4)
    fences.accept(work)
    fences.cancel(work, 0.0)
    fences.bury(early.key, 0.0)
    assert [fences.check(w) for w in (work, early)] == ["cancelled", "cancelled"]
    assert not fences.is_repeat(work)
    fences.expire(TOMBSTONE_S - 0.1)
    assert fences.check(work) == "cancelled"
    fences.expire(TOMBSTONE_S)
    assert fences.check(work) is None
    assert books(fences) == Books(0, 0, 0, 0)


def test_a_late_cancel_of_an_ended_attempt_does_not_turn_its_answer() -> None:
    fences = Fences()
    work = work_of(4)
    fences.accept(work)
    fences.end(work, 0.0)
    fences.bury(work.key, 1.0)
    assert fences.is_repeat(work)
    assert fences.check(work) is None


def test_a_newer_attempt_of_a_unit_replaces_the_older_and_an_older_one_is_stale() -> None:
    fences = Fences()
    first = work_of(4, unit=1)
    second = work_of(4, unit=1)
    other_gateway = work_of(4, unit=1, gateway_incarnation=5)
    fences.accept(first)
    assert fences.check(second) is None
    assert fences.accept(second) == first.key
    fences.cancel(first, 0.0)
    assert fences.check(work_of(4, unit=1, attempt=first.attempt)) == "stale_attempt"
    assert fences.accept(other_gateway) is None
    fences.end(second, 0.0)
    fences.end(other_gateway, 0.0)
    assert books(fences) == Books(0, 1, 2, 2)


def test_an_older_attempt_that_comes_after_the_end_of_a_newer_one_is_stale() -> None:
    fences = Fences()
    late, newer = work_of(4, unit=1), work_of(4, unit=1)
    fences.accept(newer)
    fences.end(newer, 10.0)
    assert fences.check(late) == "stale_attempt"
    newest = work_of(4, unit=1)
    assert fences.accept(newest) is None, "the one before has ended: there is nothing to cancel"
    fences.expire(10.0 + TOMBSTONE_S)
    assert fences.check(late) == "stale_attempt", "the newest lives"
    fences.cancel(newest, 50.0)
    fences.expire(50.0 + TOMBSTONE_S)
    assert fences.check(late) is None
    assert books(fences) == Books(0, 0, 0, 0)


def test_a_fence_refuses_a_gateways_attempts_up_to_its_number_and_never_sinks() -> None:
    fences = Fences()
    work = work_of(4)
    fences.fence(GATEWAY, work.attempt)
    fences.fence(GATEWAY, 0)
    assert fences.check(work) == "stale_attempt"
    assert fences.check(work_of(4, attempt=work.attempt + 1)) is None
    assert fences.check(work_of(4, attempt=0, gateway_incarnation=5)) is None


def test_tombstones_and_fences_are_bounded_and_the_oldest_goes_first() -> None:
    fences = Fences()
    for number in range(MAX_TOMBSTONES + 1):
        fences.bury((number.to_bytes(16, "big"), 0), 0.0)
    assert books(fences).buried == MAX_TOMBSTONES
    for unit in range(MAX_TOMBSTONES + 1):
        work = work_of(4, unit=unit)
        fences.accept(work)
        fences.end(work, 0.0)
    assert (books(fences).units, books(fences).ended) == (MAX_TOMBSTONES, MAX_TOMBSTONES)
    assert fences.check(work_of(4, ticket=bytes(16), attempt=0)) is None
    for gateway in range(MAX_FENCES + 1):
        fences.fence(gateway, 5)
    assert fences.check(work_of(4, attempt=1, gateway_incarnation=0)) is None
    assert fences.check(work_of(4, attempt=1, gateway_incarnation=1)) == "stale_attempt"
