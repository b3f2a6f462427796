"""The sampler: order of filters, ties, the inverse CDF, and a plain model of all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engine.philox import uniform
from kvferry.engine.sampler import draw, kept
from kvferry.wire.messages import Sampling


def logits_of(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def plain(logits: np.ndarray, sampling: Sampling, u: float) -> int:
    """The same draw in plain Python: full sort, fp32 sums, no shortcuts."""
    weights = np.exp((logits - logits.max()) / np.float32(sampling.temperature))
    order = sorted(range(len(weights)), key=lambda token: (-float(weights[token]), token))
    order = [token for token in order if weights[token] >= np.float32(sampling.min_p)]
    if sampling.top_k:
        order = order[: sampling.top_k]
    sums, total = [], np.float32(0)
    for token in order:
        total = np.float32(total + weights[token])
        sums.append(total)
    if sampling.top_p < 1:
        end = next(i for i, value in enumerate(sums) if value >= np.float32(sampling.top_p) * total)
        order, sums = order[: end + 1], sums[: end + 1]
    target = np.float32(u) * sums[-1]
    return next((token for token, value in zip(order, sums, strict=True) if value > target), order[-1])


@given(
    st.lists(st.integers(-6, 6), min_size=1, max_size=40),
    st.floats(0.3, 3),
    st.integers(0, 12),
    st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    st.integers(0, 2**64 - 1),
)
def test_the_draw_equals_a_plain_model_of_it(
    values: list[int], temperature: float, top_k: int, top_p: float, min_p: float, seed: int
) -> None:
    # Integers: many equal logits, so that ties at every border are met.
    logits = np.asarray(values, np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    for index in range(8):
        assert draw(logits, sampling, 1, index) == plain(logits, sampling, uniform(seed, 1, index))


def test_greedy_takes_the_lower_id_of_equal_logits() -> None:
    assert draw(logits_of(1, 3, 3, 2), Sampling(temperature=0), 0, 0) == 1
    assert draw(logits_of(1, 3, 3, 2), Sampling(temperature=1e-9), 0, 0) == 1


def test_ties_at_the_border_of_top_k_go_to_the_lower_id() -> None:
    ids, _ = kept(logits_of(0, 5, 2, 2, 2, 1), Sampling(top_k=3))
    assert ids.tolist() == [1, 2, 3]


def test_min_p_acts_after_temperature_and_before_top_p() -> None:
    logits = np.log(logits_of(0.5, 0.2, 0.2, 0.1))
    assert kept(logits, Sampling(min_p=0.3))[0].tolist() == [0, 1, 2]
    # At temperature 0.5 the ratios are squared: 0.16 < 0.3.
    assert kept(logits, Sampling(min_p=0.3, temperature=0.5))[0].tolist() == [0]
    # top_p of what top_k left: 0.5 of 0.7 is 0.71 >= 0.7.
    assert kept(logits, Sampling(top_k=2, top_p=0.7))[0].tolist() == [0]
    assert kept(logits, Sampling(top_p=0.7))[0].tolist() == [0, 1]


def test_draws_follow_the_distribution() -> None:
    probabilities = np.asarray([0.5, 0.3, 0.15, 0.05])
    logits = np.log(probabilities).astype(np.float32)
    count = 4000
    drawn = [draw(logits, Sampling(seed=11), 0, index) for index in range(count)]
    shares = np.bincount(drawn, minlength=4) / count
    assert np.all(np.abs(shares - probabilities) < 4 * np.sqrt(probabilities * (1 - probabilities) / count))


@pytest.mark.parametrize(
    "logits",
    [
        logits_of(math.nan, 1, 2), logits_of(math.nan, math.nan), logits_of(-math.inf, -math.inf),
        logits_of(math.inf, 0), logits_of(-math.inf, 0, 3),
    ],
)  # fmt: skip
def test_broken_logits_still_give_a_token_of_the_vocabulary(logits: np.ndarray) -> None:
    for temperature in (0.0, 1.0):
        assert 0 <= draw(logits, Sampling(temperature=temperature, top_k=2, top_p=0.9), 0, 0) < len(logits)


def test_a_large_vocabulary_with_top_k_equals_the_full_sort() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 5000).astype(np.float32).round(1)
    sampling = Sampling(top_k=50, temperature=0.7, seed=4)
    for index in range(20):
        assert draw(logits, sampling, 0, index) == plain(logits, sampling, uniform(4, 0, index))


def test_tokens_left_out_as_negligible_change_no_bit_of_the_sums() -> None:
    # Weights on both sides of 2**-24, and so many of them that together they would weigh.
    logits = np.concatenate((np.zeros(1), np.linspace(-15, -18, 20_000))).astype(np.float32)
    weights = np.sort(np.exp(logits - logits.max()))[::-1]
    full = np.cumsum(weights, dtype=np.float32)
    ids, cumulated = kept(logits, Sampling())
    assert 1 < len(ids) < len(logits)
    assert np.array_equal(cumulated, full[: len(ids)])
    assert cumulated[-1] == full[-1]
