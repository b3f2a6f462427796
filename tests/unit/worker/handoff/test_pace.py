"""How many credits a decode worker gives while its streams decode."""

from __future__ import annotations

import pytest

from kvferry.worker.handoff.pace import Pace
from kvferry.worker.handoff.timing import TransferRate

FRAME = 4 << 20
LONG = 100 * FRAME
RATE = TransferRate().bytes_per_s  # before anything is measured


def paced(share: float = 0.25) -> Pace:
    return Pace(share, FRAME, TransferRate())


def test_without_streams_that_decode_nothing_is_held_back() -> None:
    pace = paced()
    assert pace.take(100, 0, LONG) == 100
    pace.begin_step(None)
    assert pace.take(100, 0, LONG) == 100
    assert pace.seconds(10 * FRAME) == pytest.approx(10 * FRAME / RATE)


def test_a_short_step_gets_one_frame_whatever_its_share() -> None:
    pace = paced()
    for _ in range(3):
        pace.begin_step(0.001)
        assert pace.take(4, 0, LONG) == 1
        assert pace.take(4, 0, LONG) == 0


def test_a_step_gets_as_many_frames_as_land_in_its_share() -> None:
    pace = paced(share=0.25)
    pace.begin_step(4 * 3.5 * FRAME / RATE)  # a quarter of it takes three and a half frames
    assert pace.take(2, 0, LONG) == 2
    assert pace.take(2, 0, LONG) == 1
    assert pace.take(2, 0, LONG) == 0


def test_what_a_step_leaves_is_not_saved_for_the_next() -> None:
    pace = paced()
    pace.begin_step(0.001)
    pace.begin_step(0.001)
    assert pace.take(4, 0, LONG) == 1


def test_credits_that_are_not_used_yet_count() -> None:
    pace = paced(share=0.25)
    pace.begin_step(4 * 3.5 * FRAME / RATE)
    assert pace.take(4, 2, LONG) == 1
    pace.begin_step(4 * 3.5 * FRAME / RATE)
    assert pace.take(4, 3, LONG) == 0
    assert pace.take(4, 4, LONG) == 0


def test_the_frames_of_short_pulls_cost_what_they_bring() -> None:
    pace = paced()
    pace.begin_step(0.001)
    assert pace.take(2, 0, FRAME // 3) == 2, "its KV and the manifest"
    assert pace.take(2, 0, FRAME // 2) == 2
    assert pace.take(2, 0, FRAME // 3) == 0, "more than is left of a frame"
    assert pace.take(1, 1, FRAME // 3) == 1, "the manifest costs nothing"


def test_a_step_that_nobody_has_measured_yet_gets_one_frame() -> None:
    pace = paced()
    pace.begin_step(0.0)
    assert pace.take(4, 0, LONG) == 1


def test_a_share_of_one_turns_the_pace_off() -> None:
    pace = paced(share=1.0)
    pace.begin_step(0.001)
    assert pace.take(100, 0, LONG) == 100


def test_a_paced_pull_is_expected_to_take_its_steps() -> None:
    pace = paced()
    pace.begin_step(0.012)
    assert pace.seconds(10 * FRAME) == pytest.approx(10 * 0.012)
    assert pace.seconds(10 * FRAME - 1) == pytest.approx(10 * 0.012)


def test_a_faster_link_brings_more_frames_a_step() -> None:
    rate = TransferRate()
    pace = Pace(0.25, FRAME, rate)
    for _ in range(8):
        rate.observe(1 << 30, 0.1)
    pace.begin_step(0.02)
    assert pace.take(100, 0, LONG) >= 8
