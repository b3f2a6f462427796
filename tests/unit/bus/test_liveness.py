"""Who is judged gone, and when nobody may be judged."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from kvferry.bus.liveness import (
    BEAT_INTERVAL,
    BUS_GRACE,
    MEMORY,
    PING_TIMEOUT,
    SILENCE,
    STALL,
    STALL_GRACE,
    Liveness,
    Seen,
)

A, B = 0xA, 0xB


@dataclass
class Observer:
    """A shell without I/O: it ticks as the real one does, and hears whoever beats."""

    now: float = 100.0

    def __post_init__(self) -> None:
        self.liveness = Liveness(self.now)
        self.gone: list[tuple[int, float]] = []  # (incarnation, when judged)

    def run(self, seconds: float, *beating: int) -> None:
        """`beating` send a heartbeat every interval; ticks come every interval."""
        end = self.now + seconds
        while self.now < end - 1e-9:
            self.now += BEAT_INTERVAL
            for incarnation in beating:
                self.liveness.observe(incarnation, self.now)
            self.tick()

    def tick(self) -> None:
        self.liveness.tick(self.now)
        self.gone += [(incarnation, self.now) for incarnation in self.liveness.verdicts(self.now)]

    @property
    def names(self) -> list[int]:
        return [incarnation for incarnation, _ in self.gone]


def heard(*incarnations: int) -> Observer:
    observer = Observer()
    observer.run(BEAT_INTERVAL, *incarnations)
    return observer


def test_one_that_beats_is_never_gone() -> None:
    observer = heard(A)
    observer.run(60, A)
    assert observer.gone == []
    assert A in observer.liveness
    assert observer.liveness.alive == (A,)


def test_one_that_is_silent_is_gone_once_and_within_one_tick() -> None:
    observer = heard(A, B)
    last = observer.now
    observer.run(5, B)
    assert observer.names == [A]
    assert SILENCE < observer.gone[0][1] - last <= SILENCE + BEAT_INTERVAL
    assert A not in observer.liveness
    assert B in observer.liveness


def test_a_restarted_process_is_another_incarnation_and_vouches_for_nobody() -> None:
    old, new = 1, 2
    observer = heard(old)
    observer.run(1.0, new)
    assert old in observer.liveness
    observer.run(1.0, new)
    assert observer.names == [old]
    assert observer.liveness.alive == (new,)


def test_one_whose_other_messages_come_is_not_silent() -> None:
    observer = heard(A, B)
    for _ in range(20):  # the observer is behind: heartbeats wait behind what is read now
        observer.liveness.heard(A, observer.now)
        observer.run(BEAT_INTERVAL)
    assert observer.names == [B]
    observer.run(2.0)
    assert observer.names == [B, A]
    observer.liveness.heard(A, observer.now)
    assert A not in observer.liveness, "only a heartbeat brings one back"


def test_one_that_returns_after_a_freeze_is_told_apart_from_a_new_one() -> None:
    observer = heard(A)
    assert observer.liveness.observe(A, observer.now) is Seen.ALIVE
    observer.run(2.0)
    assert observer.liveness.observe(A, observer.now) is Seen.RETURNED
    assert observer.liveness.observe(A, observer.now) is Seen.ALIVE
    assert observer.liveness.observe(B, observer.now) is Seen.NEW
    observer.run(2.0)
    assert observer.names == [A, A, B], "a second freeze is a second verdict"


def test_nobody_is_judged_while_the_bus_is_down_and_for_one_period_after() -> None:
    observer = heard(A)
    observer.liveness.bus_down(observer.now)
    observer.run(30)
    assert observer.gone == []
    observer.liveness.bus_up(observer.now)
    up = observer.now
    observer.run(BUS_GRACE - BEAT_INTERVAL)
    assert observer.gone == []
    observer.run(1.0)
    assert observer.names == [A], "the grace ends"
    assert observer.gone[0][1] - up <= BUS_GRACE + BEAT_INTERVAL


def test_one_that_reconnects_last_after_an_outage_is_not_gone() -> None:
    observer = heard(A)
    observer.liveness.bus_down(observer.now)
    observer.run(10)
    observer.liveness.bus_up(observer.now)  # we at once, A after the longest wait and with its next beat
    observer.run(1.0 + BEAT_INTERVAL)
    observer.run(10, A)
    assert observer.gone == []


def test_after_a_stall_of_our_own_loop_what_waits_is_heard_first() -> None:
    observer = heard(A, B)
    observer.now += 5.0  # nothing ran: A's heartbeats are in the socket, B's are not
    assert observer.liveness.verdicts(observer.now) == (), "not even before the tick that notices"
    observer.tick()
    assert observer.gone == []
    observer.run(STALL_GRACE - BEAT_INTERVAL, A)
    assert observer.gone == []
    observer.run(BEAT_INTERVAL, A)
    assert observer.names == [B]


def test_ticks_that_are_a_little_late_change_nothing() -> None:
    observer = heard(A)
    last = observer.now
    for _ in range(4):
        observer.now += BEAT_INTERVAL + STALL * 0.9
        observer.tick()
    assert observer.names == [A]
    assert observer.gone[0][1] - last < SILENCE + BEAT_INTERVAL + STALL


def test_a_suspect_is_pinged_once_and_an_unanswered_ping_is_the_verdict() -> None:
    observer = heard(A)
    assert observer.liveness.suspect(A, observer.now)
    assert not observer.liveness.suspect(A, observer.now), "one ping is enough"
    suspected = observer.now
    observer.run(BEAT_INTERVAL, A)  # a heartbeat sent before the end may still come in
    assert observer.names == [A]
    assert PING_TIMEOUT < observer.gone[0][1] - suspected <= PING_TIMEOUT + BEAT_INTERVAL


def test_a_suspect_that_answers_lives_on() -> None:
    observer = heard(A)
    observer.liveness.suspect(A, observer.now)
    observer.liveness.answered(A, observer.now + 0.1)
    observer.run(10, A)
    assert observer.gone == []
    assert observer.liveness.suspect(A, observer.now), "and may be suspected again"


def test_a_ping_that_finds_nobody_is_a_verdict_at_once() -> None:
    observer = heard(A)
    observer.liveness.suspect(A, observer.now)
    observer.liveness.refused(A)
    assert observer.liveness.verdicts(observer.now) == (A,)


def test_a_refusal_counts_only_for_a_suspect_and_not_after_an_outage() -> None:
    observer = heard(A)
    observer.liveness.refused(A)
    assert observer.liveness.verdicts(observer.now) == ()
    observer.liveness.suspect(A, observer.now)
    observer.liveness.refused(A)
    observer.liveness.bus_down(observer.now)
    observer.liveness.bus_up(observer.now)
    observer.liveness.answered(A, observer.now)
    observer.run(5, A)
    assert observer.gone == []


def test_around_an_outage_nobody_is_suspected_and_no_old_suspicion_lives_on() -> None:
    observer = heard(A, B)
    observer.liveness.suspect(A, observer.now)
    observer.liveness.bus_down(observer.now)
    assert not observer.liveness.suspect(B, observer.now)
    observer.liveness.bus_up(observer.now)
    observer.run(BEAT_INTERVAL)  # B has not reconnected yet, so a request finds nobody
    assert not observer.liveness.suspect(B, observer.now)
    observer.liveness.refused(B)
    observer.run(2 * BUS_GRACE, A, B)
    assert observer.gone == []
    assert observer.liveness.suspect(B, observer.now)


def test_unknown_gone_and_forgotten_ones_are_not_suspected_and_get_no_verdict() -> None:
    observer = heard(A, B)
    assert not observer.liveness.suspect(0xDEAD, observer.now)
    observer.liveness.answered(0xDEAD, observer.now)
    observer.liveness.forget(B)
    observer.run(2.0)
    assert observer.names == [A]
    assert not observer.liveness.suspect(A, observer.now)
    observer.liveness.answered(A, observer.now)
    assert A not in observer.liveness


def test_gone_ones_are_remembered_for_a_while_and_then_cost_nothing() -> None:
    observer = heard(A)
    observer.run(2.0)
    observer.run(MEMORY - 10)
    assert observer.liveness.observe(A, observer.now) is Seen.RETURNED
    observer.run(2.0 + MEMORY + 10)
    assert observer.liveness.observe(A, observer.now) is Seen.NEW


jitter = st.floats(0.0, 0.1)


@given(st.lists(jitter, min_size=20, max_size=60), st.lists(st.floats(0.0, STALL), min_size=20, max_size=60))
def test_no_jitter_of_beats_or_ticks_makes_a_living_one_gone(beats: list[float], lateness: list[float]) -> None:
    liveness = Liveness(0.0)
    events = [(BEAT_INTERVAL * number + late, "beat") for number, late in enumerate(beats)]
    now = 0.0
    for late in lateness:
        now += BEAT_INTERVAL + late
        events.append((now, "tick"))
    end = events[len(beats) - 1][0]
    for at, what in sorted(event for event in events if event[0] <= end):
        if what == "beat":
            liveness.observe(A, at)
        else:
            liveness.tick(at)
            assert liveness.verdicts(at) == ()


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("stall"), st.floats(0.6, 5.0)),
            st.tuples(st.just("outage"), st.floats(0.0, 20.0)),
            st.tuples(st.just("run"), st.floats(0.0, 10.0)),
        ),
        max_size=12,
    )
)
def test_whatever_befalls_the_observer_the_living_stay_and_the_dead_go(history: list[tuple[str, float]]) -> None:
    observer = heard(A, B)
    for what, seconds in history:  # B has died; A beats whenever it can be heard
        if what == "stall":
            observer.now += seconds
            observer.tick()
            observer.liveness.observe(A, observer.now)
        elif what == "outage":
            observer.liveness.bus_down(observer.now)
            observer.run(seconds)
            observer.liveness.bus_up(observer.now)
        observer.run(seconds if what == "run" else BEAT_INTERVAL, A)
    observer.run(BUS_GRACE + SILENCE + BEAT_INTERVAL, A)
    assert observer.names == [B]
