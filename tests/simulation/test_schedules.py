"""Schedules of faults that hypothesis draws, and shrinks where one fails."""

from __future__ import annotations

import pytest
from faults import KINDS, PHASES, Fault, Kind, dump, load
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from seed import FailedSeed, play

from kvferry.wire import frame

NUM_REQUESTS = 10
FEW_REQUESTS = 4
CALM_SEED = 54  # it has no bad frames of its own, and all prompts go over the hand-off
SECONDS = 2.0


def decimals(least: float, most: float) -> st.SearchStrategy[float]:
    """Numbers that a replay command gives back exactly."""
    return st.integers(round(least * 100), round(most * 100)).map(lambda hundredths: hundredths / 100)


def schedules_of(kinds: tuple[Kind, ...], most: int) -> st.SearchStrategy[list[Fault]]:
    faults = st.builds(
        Fault,
        kind=st.sampled_from(kinds),
        at=decimals(0.0, SECONDS),
        where=decimals(0.0, 0.99),
        lasts=decimals(0.05, 3.0),
        phase=st.sampled_from(PHASES),
    )
    return st.lists(faults, min_size=1, max_size=most).map(lambda drawn: sorted(drawn, key=lambda fault: fault.at))


schedules = schedules_of(KINDS, 6)
quietly = settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@given(st.integers(0, 1000), schedules)
@quietly
def test_whatever_schedule_is_drawn_every_answer_is_right(seed: int, faults: list[Fault]) -> None:
    play(seed, faults, NUM_REQUESTS)


def test_a_bug_is_shrunk_to_the_fault_that_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "_checksum", lambda slot, end: 0)
    failures: list[str] = []

    def fails(faults: list[Fault]) -> bool:
        try:
            play(CALM_SEED, faults, FEW_REQUESTS)
        except FailedSeed as failure:
            failures.append(str(failure))
            return True
        return False

    some = schedules_of(("lost_beats", "bad_frames", "slow_client"), 3)
    least = find(some, fails, settings=settings(quietly, max_examples=40, phases=(Phase.generate, Phase.shrink)))
    assert [fault.kind for fault in least] == ["bad_frames"]
    replayed = f"seed {CALM_SEED} --requests {FEW_REQUESTS} --faults '{dump(least)}'"
    assert any(replayed in failure for failure in failures)


@given(schedules)
def test_a_schedule_survives_the_way_through_a_replay_command(faults: list[Fault]) -> None:
    assert load(dump(faults)) == faults
