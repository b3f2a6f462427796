"""What is learned online comes close to what was true, and never leaves its range."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_gateway.placement import estimates
from kvferry_gateway.placement.estimates import Ewma, ForecastError, LinkRates, StepLine


def test_mean_and_variance_are_those_of_the_latest_observations() -> None:
    draw, ewma = random.Random(0), Ewma(memory=200)
    for _ in range(1000):
        ewma.observe(draw.gauss(100.0, 1.0))
    for _ in range(2000):
        ewma.observe(draw.gauss(5.0, 2.0))
    assert ewma.mean == pytest.approx(5.0, abs=0.5)
    assert ewma.variance == pytest.approx(4.0, abs=1.2)


def test_a_first_guess_holds_until_something_is_observed() -> None:
    ewma = Ewma(10, mean=3.0)
    assert (ewma.mean, ewma.known) == (3.0, False)
    ewma.observe(math.nan)
    ewma.observe(8.0, weight=0.0)
    assert not ewma.known
    ewma.observe(8.0)
    assert (ewma.mean, ewma.known) == (8.0, True)


def test_weight_counts() -> None:
    ewma = Ewma(memory=1e9)
    ewma.observe(1.0, weight=3.0)
    ewma.observe(5.0, weight=1.0)
    assert ewma.mean == pytest.approx(2.0)


def test_base_and_slope_of_a_step_are_found() -> None:
    draw, line = random.Random(0), StepLine()
    for _ in range(500):
        sequences = draw.randrange(1, 16)
        line.observe(sequences, (0.007 + 0.0006 * sequences) * draw.gauss(1.0, 0.02))
    fit = line.fit()
    assert fit is not None
    assert fit == pytest.approx((0.007, 0.0006), rel=0.1)


def test_one_batch_size_gives_a_line_through_what_was_seen() -> None:
    line = StepLine()
    assert line.fit() is None
    for _ in range(5):
        line.observe(4, 0.02)
    base, slope = line.fit() or (0.0, 0.0)
    assert base + 4 * slope == pytest.approx(0.02)
    assert slope > 0


@given(st.lists(st.tuples(st.integers(1, 64), st.floats(1e-4, 1.0)), min_size=1, max_size=30))
def test_a_step_is_never_predicted_to_get_shorter_with_more_sequences(seen: list[tuple[int, float]]) -> None:
    line = StepLine()
    for sequences, seconds in seen:
        line.observe(sequences, seconds)
    base, slope = line.fit() or (-1.0, -1.0)
    assert base >= -1e-12
    assert slope >= 0


def test_a_link_has_its_own_rate_and_an_unknown_one_the_average() -> None:
    links = LinkRates(7.0)
    assert links.matrix([1], [2]).tolist() == [[7.0]]
    links.observe(1, 2, 100.0, 10.0)
    links.observe(3, 2, 100.0, 5.0)
    assert links.matrix([1, 3, 4], [2]).tolist() == [[10.0], [20.0], [links.average]]
    assert 10.0 < links.average < 20.0
    links.forget(2)
    assert len(links) == 0
    assert links.matrix([1], [2]).tolist() == [[links.average]]


def test_links_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "MAX_LINKS", 10)
    links = LinkRates(1.0)
    for prefill in range(20):
        for decode in range(100, 104):
            links.observe(prefill, decode, 100.0, 1.0)
            assert len(links) <= 10 + 4
    assert links.matrix([0], [100])[0, 0] == links.average


def test_chances_learn_bias_and_spread() -> None:
    draw, error = random.Random(0), ForecastError(sigma=0.5)
    for _ in range(3000):
        error.observe(1.0, 2.0 * math.exp(draw.gauss(0.0, 0.3)))
    assert error.bias == pytest.approx(math.log(2.0), abs=0.1)
    assert error.sigma == pytest.approx(0.3, abs=0.06)
    chances = error.chance(np.asarray([0.1, 0.5, 100.0]), 1.0)
    assert chances == pytest.approx([1.0, 0.5, 0.0], abs=0.12)


def test_a_chance_is_that_of_the_lognormal_distribution() -> None:
    error = ForecastError(sigma=0.4)
    for z in (-2.0, -1.0, 0.0, 0.5, 1.5):
        forecast = np.asarray(math.exp(-0.4 * z))
        normal = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert float(error.chance(forecast, 1.0)) == pytest.approx(normal, abs=0.012)


@given(st.floats(0, 1e12), st.floats(1e-6, 1e6), st.lists(st.tuples(st.floats(1e-9, 1e9), st.floats(1e-9, 1e9))))
def test_a_chance_is_never_below_0_or_above_1(forecast: float, target: float, seen: list[tuple[float, float]]) -> None:
    error = ForecastError(sigma=0.5)
    for before, after in seen:
        error.observe(before, after)
    assert 0.0 <= float(error.chance(np.asarray(forecast), target)) <= 1.0
