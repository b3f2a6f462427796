"""The sampler: order of filters, ties, the inverse CDF, penalties, and a plain model of all of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from masks import mask_of

from kvferry.engine.sampling.philox import uniform24
from kvferry.engine.sampling.sampler import WEIGHT_ONE, draw, find_logprobs, kept, sample, weigh
from kvferry.schedule.step import Draw
from kvferry.wire.sampling import Sampling

CHI_SQUARE_DRAWS = 20_000


def logits_of(*values: float) -> np.ndarray:
    return np.asarray(values, np.float32)


def drawn(logits: np.ndarray, sampling: Sampling, choice: int = 0, index: int = 0) -> int:
    return draw(logits, Draw(sampling, choice, index))


def plain(logits: np.ndarray, sampling: Sampling, u24: int) -> int:
    """The same draw in plain Python: full sort, whole numbers, no shortcuts."""
    weights = weigh(logits, sampling.temperature).tolist()
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    order = [token for token in order if weights[token] >= sampling.min_p * WEIGHT_ONE]
    if sampling.top_k:
        order = order[: sampling.top_k]
    sums, total = [], 0
    for token in order:
        total += weights[token]
        sums.append(total)
    if sampling.top_p < 1:
        end = next(i for i, value in enumerate(sums) if value >= sampling.top_p * total)
        order, sums = order[: end + 1], sums[: end + 1]
    return next(token for token, value in zip(order, sums, strict=True) if value << 24 > u24 * sums[-1])


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
        assert drawn(logits, sampling, 1, index) == plain(logits, sampling, uniform24(seed, 1, index))


@given(st.lists(st.floats(-60, 60, width=32), min_size=1, max_size=200), st.floats(0.05, 20))
def test_weights_are_the_exponentials_rounded_down(values: list[float], temperature: float) -> None:
    logits = np.asarray(values, np.float32)
    weights = weigh(logits, temperature).astype(np.float64)
    differences = logits.astype(np.float64) - float(logits.max())
    expected = np.exp(differences / temperature) * WEIGHT_ONE
    # One for rounding down; the rest is fp32: of the exponent, which is at most 33, and of the polynomial.
    assert np.all(np.abs(weights - expected) <= 1 + expected * 33 * 2.0**-23)
    assert weights.max() == weights[logits.argmax()] == WEIGHT_ONE


def test_greedy_takes_the_lower_id_of_equal_logits() -> None:
    assert drawn(logits_of(1, 3, 3, 2), Sampling(temperature=0)) == 1
    assert drawn(logits_of(1, 3, 3, 2), Sampling(temperature=1e-9)) == 1


def test_ties_at_the_border_of_top_k_go_to_the_lower_id() -> None:
    ids, _ = kept(logits_of(0, 5, 2, 2, 2, 1), Sampling(top_k=3))
    assert ids.tolist() == [1, 2, 3]


def test_min_p_acts_after_temperature_and_before_top_p() -> None:
    logits = np.log(logits_of(0.5, 0.2, 0.2, 0.1))
    assert kept(logits, Sampling(min_p=0.3))[0].tolist() == [0, 1, 2]
    # At temperature 0.5 the ratios are squared: 0.16 < 0.3.
    assert kept(logits, Sampling(min_p=0.3, temperature=0.5))[0].tolist() == [0]
    # top_p of what top_k left: 0.5 of 0.7 is 0.71 >= 0.7; of all, it takes two.
    assert kept(logits, Sampling(top_k=2, top_p=0.7))[0].tolist() == [0]
    assert kept(logits, Sampling(top_p=0.69))[0].tolist() == [0, 1]


def chi_square(tokens: list[int], probabilities: np.ndarray) -> tuple[float, float]:
    """The statistic, and the value that it exceeds once in about 30,000 tries if the probabilities are right."""
    expected = probabilities * len(tokens)
    assert expected.min() > 5, "the statistic needs more draws"
    observed = np.bincount(tokens, minlength=len(probabilities))
    degrees = len(probabilities) - 1
    # Wilson and Hilferty: the cube root is nearly normal; four standard deviations.
    limit = degrees * (1 - 2 / (9 * degrees) + 4 * math.sqrt(2 / (9 * degrees))) ** 3
    return float(((observed - expected) ** 2 / expected).sum()), limit


def test_draws_follow_the_distribution_and_another_temperature_would_show() -> None:
    logits = np.random.default_rng(2).normal(0, 1.2, 40).astype(np.float32)
    sampling = Sampling(seed=11, temperature=0.8)
    rows = np.broadcast_to(logits, (CHI_SQUARE_DRAWS, len(logits)))
    tokens = sample(rows, [Draw(sampling, 0, index) for index in range(CHI_SQUARE_DRAWS)]).tokens
    for temperature, right in ((0.8, True), (0.84, False)):
        weights = np.exp(logits.astype(np.float64) / temperature)
        statistic, limit = chi_square(tokens, weights / weights.sum())
        assert (statistic < limit) is right, temperature


@pytest.mark.parametrize(
    "logits",
    [
        logits_of(math.nan, 1, 2), logits_of(math.nan, math.nan), logits_of(-math.inf, -math.inf),
        logits_of(math.inf, 0), logits_of(-math.inf, 0, 3),
    ],
)  # fmt: skip
def test_broken_logits_still_give_a_token_of_the_vocabulary(logits: np.ndarray) -> None:
    for temperature in (0.0, 1.0):
        assert 0 <= drawn(logits, Sampling(temperature=temperature, top_k=2, top_p=0.9)) < len(logits)


def test_nan_is_never_drawn_beside_a_number() -> None:
    logits = logits_of(math.nan, -5, math.nan, 2)
    assert drawn(logits, Sampling(temperature=0)) == 3
    assert {drawn(logits, Sampling(temperature=9, seed=1), index=index) for index in range(200)} == {1, 3}


def test_a_large_vocabulary_with_top_k_equals_the_full_sort() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 5000).astype(np.float32).round(1)
    sampling = Sampling(top_k=50, temperature=0.7, seed=4)
    for index in range(20):
        assert drawn(logits, sampling, index=index) == plain(logits, sampling, uniform24(4, 0, index))


def penalised(logits: np.ndarray, history: list[int], num_prompt: int, sampling: Sampling) -> np.ndarray:
    """The formulas of OpenAI and vLLM, token by token, in fp32."""
    changed = logits.copy()
    for token in range(len(logits)):
        count = history[num_prompt:].count(token)
        if token in history:
            factor = np.float32(sampling.repetition_penalty)
            changed[token] = changed[token] / factor if changed[token] > 0 else changed[token] * factor
        changed[token] -= np.float32(sampling.frequency_penalty) * np.float32(count)
        if count:
            changed[token] -= np.float32(sampling.presence_penalty)
    return changed


@given(
    st.lists(st.integers(-6, 6), min_size=4, max_size=12),
    st.lists(st.integers(0, 3), max_size=20),
    st.integers(0, 20),
    st.sampled_from([-2.0, 0.0, 0.3, 2.0]),
    st.sampled_from([-2.0, 0.0, 0.3, 2.0]),
    st.sampled_from([0.5, 1.0, 1.3]),
)
def test_penalties_are_those_of_the_formula_and_come_before_temperature(
    values: list[int], history: list[int], num_prompt: int, presence: float, frequency: float, repetition: float
) -> None:
    logits = np.asarray(values, np.float32)
    num_prompt = min(num_prompt, len(history))
    tokens = np.asarray(history, np.uint32)
    for temperature in (0.0, 0.7):
        sampling = Sampling(
            temperature=temperature, seed=3, presence_penalty=presence, frequency_penalty=frequency,
            repetition_penalty=repetition,
        )  # fmt: skip
        neutral = Sampling(temperature=temperature, seed=3)
        before = logits.copy()
        for index in range(4):
            wanted = Draw(sampling, 0, index, tokens, num_prompt)
            assert draw(logits, wanted) == drawn(penalised(logits, history, num_prompt, sampling), neutral, 0, index)
        assert np.array_equal(logits, before), "the row was changed"


def test_presence_and_frequency_leave_the_prompt_alone_and_repetition_does_not() -> None:
    logits = logits_of(1.0, 1.5)
    history = np.asarray([1, 1], np.uint32)
    for field in ({"presence_penalty": 1.0}, {"frequency_penalty": 1.0}):
        greedy = Sampling(temperature=0, **field)
        assert draw(logits, Draw(greedy, 0, 0, history, 2)) == 1
        assert draw(logits, Draw(greedy, 0, 1, history, 1)) == 0
    greedy = Sampling(temperature=0, repetition_penalty=2.0)
    assert draw(logits, Draw(greedy, 0, 0, history, 2)) == 0


def test_a_ban_beats_a_bias_and_a_bias_moves_the_best() -> None:
    logits = logits_of(1, 2, 3)
    greedy = Sampling(temperature=0)
    assert draw(logits, Draw(greedy, 0, 0, logit_bias=((0, 2.5),))) == 0
    assert draw(logits, Draw(greedy, 0, 0, logit_bias=((2, 100.0),), banned=(2,))) == 1
    assert draw(logits, Draw(greedy, 0, 0, logit_bias=((0, 1.0), (0, 1.5)))) == 0, "a bias given twice adds up"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "logits",
    [[5, 1, 2, 3], [math.inf, 1, 2, 3], [5, -math.inf, math.nan, -math.inf], [math.nan] * 4, [math.inf] * 4],
    ids=["whole", "a best outside", "broken where it counts", "nan", "inf"],
)
def test_nothing_is_drawn_beside_the_mask_whatever_the_logits(logits: list[float], temperature: float) -> None:
    mask = mask_of(np.asarray([False, True, True, False]))
    for index in range(30):
        wanted = Draw(Sampling(temperature=temperature), 0, index, logit_bias=((0, 100.0),), mask=mask)
        assert draw(logits_of(*logits), wanted) in (1, 2)


def test_a_ban_holds_within_the_mask_unless_it_bans_all_that_the_grammar_allows() -> None:
    logits, greedy = logits_of(1, 2, 3, 4), Sampling(temperature=0)
    mask = mask_of(np.asarray([False, True, True, False]))
    assert draw(logits, Draw(greedy, 0, 0, mask=mask)) == 2
    assert draw(logits, Draw(greedy, 0, 0, banned=(2, 3), mask=mask)) == 1
    assert draw(logits, Draw(greedy, 0, 0, banned=(1, 2), mask=mask)) == 2, "the grammar comes first"


def test_logprobs_are_not_masked() -> None:
    logits = logits_of(1, 2, 3, 4)
    wanted = Draw(Sampling(temperature=0), 0, 0, num_logprobs=2, mask=mask_of(np.asarray([False, True, True, False])))
    result = sample(logits[None], [wanted])
    assert (result.tokens, result.logprobs) == ([2], [find_logprobs(logits, 2, 2)])


def test_logprobs_are_of_the_raw_logits_with_vllms_rank_and_ties_by_id() -> None:
    logits = np.log(logits_of(0.1, 0.4, 0.1, 0.4))
    found = find_logprobs(logits, 2, 3)
    assert found.top_tokens == (1, 3, 0)
    assert found.rank == 4  # as many as are at least as likely
    assert np.allclose([found.logprob, *found.top_logprobs], np.log([0.1, 0.4, 0.4, 0.1]), atol=1e-6)
    wanted = Draw(Sampling(temperature=0, repetition_penalty=2), 0, 0, np.asarray([1], np.uint32), 1, num_logprobs=0)
    result = sample(logits[None], [wanted])
    assert result.logprobs == [find_logprobs(logits, result.tokens[0], 0)]


def test_logprobs_agree_with_a_softmax_in_double_precision() -> None:
    logits = np.random.default_rng(1).normal(0, 3, 49_152).astype(np.float32)
    wide = logits.astype(np.float64)
    expected = wide - wide.max() - math.log(np.exp(wide - wide.max()).sum())
    found = find_logprobs(logits, 77, 20)
    assert found.logprob == pytest.approx(expected[77], abs=3e-5)
    assert found.top_tokens == tuple(np.argsort(-wide, kind="stable")[:20].tolist())
    assert np.allclose(found.top_logprobs, np.sort(expected)[::-1][:20], atol=3e-5)
