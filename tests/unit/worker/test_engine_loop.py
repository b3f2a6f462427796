"""What a worker learns of its own steps."""

from __future__ import annotations

from kvferry.worker.engine_loop import MAX_STEP_GROWTH, STEP_SMOOTHING, smoothed


def after(mean: float, *steps: float) -> float:
    for seconds in steps:
        mean = smoothed(mean, seconds)
    return mean


def test_the_mean_follows_steps_of_a_usual_length() -> None:
    assert after(0.0, 0.02) == 0.02
    assert abs(after(0.0, *[0.01, 0.03] * 100) - 0.02) < 0.002


def test_a_step_that_was_frozen_is_forgotten_within_a_few() -> None:
    frozen = after(0.02, 25.0)
    assert frozen <= 0.02 * (1 + MAX_STEP_GROWTH * STEP_SMOOTHING)
    assert after(frozen, *[0.02] * 5) < 0.02 * 1.5
    assert after(frozen, *[0.02] * 30) < 0.02 * 1.04


def test_without_a_bound_it_would_be_remembered_for_thirty() -> None:
    plain = 0.02 + (25.0 - 0.02) * STEP_SMOOTHING
    for _ in range(30):
        plain += (0.02 - plain) * STEP_SMOOTHING
    assert plain > 0.02 * 5


def test_steps_that_stay_long_are_followed() -> None:
    assert after(0.005, *[0.3] * 50) > 0.28
