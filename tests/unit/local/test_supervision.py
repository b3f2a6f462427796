"""The supervisor's decisions, without a process."""

from __future__ import annotations

import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_local.supervision import (
    FIRST_BACKOFF_S,
    MAX_BACKOFF_S,
    STEADY_S,
    Added,
    AllReady,
    Announce,
    Event,
    Exited,
    Failed,
    Finished,
    Gone,
    Identified,
    Ready,
    Restarting,
    Retire,
    Role,
    Send,
    Start,
    StopAsked,
    Supervision,
    Tick,
    cause_of,
)

CHILDREN: list[tuple[str, Role]] = [("prefill-0", "prefill"), ("decode-0", "decode"), ("gateway-0", "gateway")]
GRACE = 10.0


def started() -> Supervision:
    supervision = Supervision(CHILDREN, GRACE)
    assert supervision.begin() == [Start("prefill-0"), Start("decode-0"), Start("gateway-0")]
    return supervision


def ready() -> Supervision:
    supervision = started()
    for name, _ in CHILDREN[:-1]:
        assert supervision.handle(Ready(name), 1.0) == []
    assert supervision.handle(Ready("gateway-0"), 1.0) == [AllReady()]
    return supervision


@pytest.mark.parametrize(
    ("returncode", "asked", "cause"),
    [
        (0, False, "stopped"),
        (1, False, "crashed"),
        (-signal.SIGKILL, False, "killed"),
        (-signal.SIGTERM, False, "killed"),
        (-signal.SIGSEGV, False, "crashed"),
        (-signal.SIGABRT, False, "crashed"),
        (-signal.SIGKILL, True, "stopped"),
        (1, True, "stopped"),
    ],
)
def test_the_cause_of_an_exit_tells_faults_from_orders(returncode: int, asked: bool, cause: str) -> None:
    assert cause_of(returncode, asked) == cause


def test_all_ready_comes_once_also_when_a_child_restarts() -> None:
    supervision = ready()
    supervision.handle(Exited("decode-0", -signal.SIGKILL), 50.0)
    assert supervision.handle(Ready("decode-0"), 51.0) == []


def test_a_child_that_dies_is_announced_and_started_at_once() -> None:
    supervision = ready()
    supervision.handle(Identified("decode-0", 7), 1.0)
    assert supervision.handle(Exited("decode-0", -signal.SIGKILL), 2.0) == [
        Announce("decode-0", "decode", 7, "killed"),
        Restarting("decode-0", "killed", -signal.SIGKILL, 0.0),
        Start("decode-0"),
    ]


def test_a_restarted_child_does_not_inherit_the_incarnation() -> None:
    supervision = ready()
    supervision.handle(Identified("decode-0", 7), 1.0)
    supervision.handle(Exited("decode-0", 1), 2.0)
    again = supervision.handle(Exited("decode-0", 1), 2.1)
    assert not any(isinstance(action, Announce) for action in again)


def test_quick_deaths_are_restarted_ever_later_up_to_a_bound() -> None:
    supervision = ready()
    delays = []
    now = 2.0
    for _ in range(10):
        (restarting, *_) = supervision.handle(Exited("decode-0", 1), now)
        assert isinstance(restarting, Restarting)
        delays.append(restarting.delay)
        if restarting.delay:
            assert supervision.deadline == now + restarting.delay
            assert supervision.handle(Tick(), now + restarting.delay - 0.01) == []
            now += restarting.delay
            assert supervision.handle(Tick(), now) == [Start("decode-0")]
        supervision.handle(Ready("decode-0"), now)
    assert delays[:4] == [0.0, FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, 4 * FIRST_BACKOFF_S]
    assert delays[-1] == MAX_BACKOFF_S
    steady = supervision.handle(Exited("decode-0", 1), now + STEADY_S)
    assert Start("decode-0") in steady


def test_a_child_that_fails_before_it_was_ready_ends_the_start_at_once() -> None:
    supervision = started()
    supervision.handle(Ready("gateway-0"), 1.0)
    assert supervision.handle(Exited("prefill-0", 2), 2.0) == [
        Failed("prefill-0", 2),
        Send("decode-0", signal.SIGKILL),  # it may be loading for seconds, deaf to SIGTERM
        Send("gateway-0", signal.SIGKILL),
    ]
    assert supervision.deadline is None
    assert supervision.handle(Exited("gateway-0", -signal.SIGKILL), 2.1) == []
    assert supervision.handle(Exited("decode-0", -signal.SIGKILL), 2.2) == [Finished()]


def test_a_child_in_backoff_does_not_hold_up_the_end_of_a_failed_start() -> None:
    supervision = Supervision([("prefill-0", "prefill"), ("decode-0", "decode")], 10.0)
    supervision.begin()
    for _ in range(2):  # killed from outside while it loads: the second time it waits before its next start
        supervision.handle(Exited("decode-0", -signal.SIGKILL), 1.0)
    assert supervision.phases()["decode-0"] == "backoff"
    assert supervision.handle(Exited("prefill-0", 2), 1.1) == [Failed("prefill-0", 2), Finished()]


def test_a_child_killed_from_outside_while_it_loads_is_started_again() -> None:
    assert Start("prefill-0") in started().handle(Exited("prefill-0", -signal.SIGKILL), 2.0)


def test_stopping_goes_gateway_decode_prefill_and_waits_for_each() -> None:
    supervision = ready()
    assert supervision.handle(StopAsked(), 5.0) == [Send("gateway-0", signal.SIGTERM)]
    assert supervision.handle(Exited("gateway-0", 0), 6.0) == [Send("decode-0", signal.SIGTERM)]
    assert supervision.handle(Exited("decode-0", 0), 7.0) == [Send("prefill-0", signal.SIGTERM)]
    assert supervision.handle(Exited("prefill-0", 0), 8.0) == [Finished()]
    assert supervision.deadline is None


def test_a_stage_over_its_grace_is_killed() -> None:
    supervision = ready()
    supervision.handle(StopAsked(), 5.0)
    assert supervision.deadline == 5.0 + GRACE
    assert supervision.handle(Tick(), 5.0 + GRACE) == [Send("gateway-0", signal.SIGKILL)]
    assert supervision.handle(Exited("gateway-0", -signal.SIGKILL), 15.1) == [Send("decode-0", signal.SIGTERM)]


def test_a_second_stop_kills_everything() -> None:
    supervision = ready()
    supervision.handle(StopAsked(), 5.0)
    assert supervision.handle(StopAsked(), 5.5) == [Send(name, signal.SIGKILL) for name, _ in CHILDREN]


def test_a_death_while_stopping_is_not_restarted() -> None:
    supervision = ready()
    supervision.handle(StopAsked(), 5.0)
    assert supervision.handle(Exited("prefill-0", -signal.SIGSEGV), 5.1) == []
    assert supervision.phases()["prefill-0"] == "stopped"


def test_a_child_in_backoff_is_not_started_once_stop_is_asked() -> None:
    supervision = ready()
    supervision.handle(Exited("decode-0", 1), 2.0)
    supervision.handle(Exited("decode-0", 1), 2.1)
    assert supervision.phases()["decode-0"] == "backoff"
    supervision.handle(StopAsked(), 2.2)
    assert supervision.handle(Tick(), 60.0) == [Send("gateway-0", signal.SIGKILL)]


def test_a_child_that_was_added_starts_and_one_that_was_retired_drains_for_as_long_as_it_takes() -> None:
    supervision = ready()
    assert supervision.handle(Added("decode-1", "decode"), 5.0) == [Start("decode-1")]
    assert supervision.handle(Ready("decode-1"), 6.0) == []
    supervision.handle(Identified("decode-1", 8), 6.0)
    assert supervision.handle(Retire("decode-1"), 7.0) == [Send("decode-1", signal.SIGTERM)]
    assert supervision.handle(Retire("decode-1"), 8.0) == []
    assert supervision.deadline is None, "no SIGKILL is planned"
    assert supervision.handle(Tick(), 1e6) == []
    assert supervision.handle(Exited("decode-1", 0), 1e6) == [
        Announce("decode-1", "decode", 8, "stopped"),
        Gone("decode-1"),
    ]
    assert "decode-1" not in supervision.phases()
    assert supervision.handle(Added("decode-1", "decode"), 1e6) == [Start("decode-1")]


def test_a_child_that_was_added_and_cannot_start_does_not_end_the_stack() -> None:
    supervision = ready()
    supervision.handle(Added("decode-1", "decode"), 5.0)
    assert supervision.handle(Exited("decode-1", 2), 5.5) == [
        Restarting("decode-1", "crashed", 2, 0.0),
        Start("decode-1"),
    ]
    supervision.handle(Exited("decode-1", 2), 6.0)
    assert supervision.phases()["decode-1"] == "backoff"
    assert supervision.handle(Retire("decode-1"), 6.1) == [Gone("decode-1")]
    assert supervision.deadline is None


def test_a_stack_that_stops_takes_its_retiring_children_along_and_adds_none() -> None:
    supervision = ready()
    supervision.handle(Added("decode-1", "decode"), 5.0)
    supervision.handle(Retire("decode-1"), 6.0)
    assert supervision.handle(StopAsked(), 7.0) == [Send("gateway-0", signal.SIGTERM)]
    assert supervision.handle(Added("decode-2", "decode"), 7.1) == [Gone("decode-2")]
    assert supervision.handle(Retire("prefill-0"), 7.2) == []
    assert supervision.handle(Exited("gateway-0", 0), 8.0) == [
        Send("decode-0", signal.SIGTERM),
        Send("decode-1", signal.SIGTERM),
    ]


def test_a_stack_is_ready_without_the_child_that_it_no_longer_waits_for() -> None:
    supervision = started()
    supervision.handle(Ready("decode-0"), 1.0)
    supervision.handle(Ready("gateway-0"), 1.0)
    supervision.handle(Retire("prefill-0"), 2.0)
    assert supervision.handle(Exited("prefill-0", 0), 3.0) == [Gone("prefill-0"), AllReady()]


EVENTS = st.one_of(
    st.builds(Exited, st.sampled_from([name for name, _ in CHILDREN]), st.sampled_from([0, 1, 2, -9, -11, -15])),
    st.builds(Ready, st.sampled_from([name for name, _ in CHILDREN])),
    st.builds(Identified, st.sampled_from([name for name, _ in CHILDREN]), st.integers(0, 3)),
    st.builds(Added, st.sampled_from(["decode-1", "prefill-1"]), st.just("decode")),
    st.builds(Retire, st.sampled_from(["decode-0", "decode-1", "prefill-0", "prefill-1"])),
    st.just(StopAsked()),
    st.just(Tick()),
)


@given(st.lists(st.tuples(EVENTS, st.floats(0, 20)), max_size=40))
def test_no_child_runs_twice_and_a_stop_always_ends(steps: list[tuple[Event, float]]) -> None:
    """Against a model of the processes: started once, ended once, and nothing left after Finished."""
    supervision = Supervision(CHILDREN, GRACE)
    running: set[str] = set()
    known = {name for name, _ in CHILDREN}
    finished = False
    now = 0.0

    def perform(actions: object) -> None:
        nonlocal finished
        assert isinstance(actions, list)
        for action in actions:
            match action:
                case Start(name):
                    assert name not in running
                    running.add(name)
                case Gone(name):
                    assert name not in running
                    known.remove(name)
                case Finished():
                    assert not running
                    finished = True

    def exit_of(name: str, returncode: int) -> None:
        if name in running:
            running.remove(name)
            perform(supervision.handle(Exited(name, returncode), now))

    perform(supervision.begin())
    for event, wait in steps:
        now += wait
        if finished:
            break
        match event:
            case Exited(name, returncode):
                exit_of(name, returncode)
            case Ready(name) | Identified(name) if name not in running:
                pass
            case Added(name):
                if name not in known:
                    known.add(name)
                    perform(supervision.handle(event, now))
            case _:
                perform(supervision.handle(event, now))
    if not finished:
        perform(supervision.handle(StopAsked(), now))
        for _ in range(2 * len(known)):
            for name in sorted(running):
                exit_of(name, 0)
        assert finished
