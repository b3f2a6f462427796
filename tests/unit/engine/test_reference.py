"""The reference pass: right texts pass, a token swapped beyond ε is refused, the bounds are neither idle nor mean."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import numpy as np
import pytest
from checkpoints import SHAPES, VOCAB_SIZE, build
from hypothesis import given
from hypothesis import strategies as st
from masks import mask_of

from kvferry.engine.reference import EPSILON, ReferencePass, gap, penalised_gap
from kvferry.engine.sampling.philox import uniform
from kvferry.engine.sampling.sampler import draw
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.sampling import Sampling

PROMPT = np.random.default_rng(3).integers(0, VOCAB_SIZE, 40).astype(np.uint32)
SAMPLINGS = [
    Sampling(temperature=0),
    Sampling(temperature=0.8, seed=5),
    Sampling(temperature=1.3, top_p=0.8, top_k=20, min_p=0.02, seed=6),
]
PENALISED = Sampling(
    temperature=0.8, seed=5, presence_penalty=0.4, frequency_penalty=0.6, repetition_penalty=1.3
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"))


def runner_of(checkpoint: Path) -> TorchRunner:
    return TorchRunner(EngineSettings(checkpoint, dtype="bfloat16", num_blocks=16, threads=1))


def generate(runner: TorchRunner, sampling: Sampling, choice: int, count: int) -> list[int]:
    """Decode token by token, beside another sequence."""
    table, beside = np.arange(8, dtype=np.int32), np.arange(8, 16, dtype=np.int32)
    tokens: list[int] = []
    chunk, start = PROMPT, 0
    for index in range(count):
        draw = Draw(sampling, choice, index, np.asarray([*PROMPT, *tokens], np.uint32), len(PROMPT))
        own = SequenceStep(0, chunk, start, table, draw)
        other = SequenceStep(1, PROMPT[: 1 + index], 0, beside)
        token = runner.execute(StepPlan((own, other))).tokens[0]
        assert token is not None
        tokens.append(token)
        start += len(chunk)
        chunk = np.asarray([token], np.uint32)
    return tokens


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded", "filtered"])
def test_a_generated_text_passes_and_a_runner_up_beyond_epsilon_does_not(checkpoint: Path, sampling: Sampling) -> None:
    runner = runner_of(checkpoint)
    reference = ReferencePass(runner_of(checkpoint))
    text = generate(runner, sampling, 3, 60)
    verdict = reference.check(PROMPT.tolist(), text, sampling, 3)
    assert verdict.accepted
    assert len(verdict.gaps) == 60
    # Swap each token for the best other one; wherever that lies beyond ε the verdict must say so.
    table = np.arange(8, dtype=np.int32)
    tokens = np.asarray([*PROMPT, *text], np.uint32)[:-1]
    logits = runner.logits(StepPlan((SequenceStep(0, tokens, 0, table),)))[0][len(PROMPT) - 1 :]
    refused = 0
    for index in (0, 17, 43, 59):
        row = logits[index].copy()
        row[text[index]] = -np.inf
        runner_up = int(row.argmax())
        swapped = [*text[:index], runner_up, *text[index + 1 :]]
        judged = reference.check(PROMPT.tolist(), swapped, sampling, 3)
        expected = gap(logits[index], runner_up, sampling, 3, index)
        assert judged.gaps[index] == pytest.approx(expected, abs=0.05)
        if expected > EPSILON + 0.05:
            refused += 1
            assert not judged.accepted
    assert refused > 0


def test_a_wrong_seed_or_choice_or_prompt_is_refused(checkpoint: Path) -> None:
    sampling = SAMPLINGS[1]
    text = generate(runner_of(checkpoint), sampling, 0, 60)
    reference = ReferencePass(runner_of(checkpoint))
    assert reference.check(PROMPT.tolist(), text, sampling, 0).accepted
    assert not reference.check(PROMPT.tolist(), text, Sampling(temperature=0.8, seed=6), 0).accepted
    assert not reference.check(PROMPT.tolist(), text, sampling, 1).accepted
    assert not reference.check(PROMPT[1:].tolist(), text, sampling, 0).accepted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_are_judged_by_what_was_generated_and_their_absence_is_refused(
    checkpoint: Path, temperature: float
) -> None:
    sampling = msgspec.structs.replace(PENALISED, temperature=temperature)
    text = generate(runner_of(checkpoint), sampling, 0, 60)
    reference = ReferencePass(runner_of(checkpoint))
    assert reference.check(PROMPT.tolist(), text, sampling, 0).accepted
    neutral = Sampling(temperature=temperature, seed=5)
    assert not reference.check(PROMPT.tolist(), text, neutral, 0).accepted
    plain = generate(runner_of(checkpoint), neutral, 0, 60)
    assert reference.check(PROMPT.tolist(), plain, neutral, 0).accepted
    assert not reference.check(PROMPT.tolist(), plain, sampling, 0).accepted


@given(
    st.integers(0, 2**32), st.sampled_from([0.0, 1.0]), st.sampled_from([0.5, 1.0, 2.0]), st.sampled_from([0.02, 0.3])
)
def test_a_penalised_draw_from_logits_moved_by_less_than_epsilon_is_never_accused(
    seed: int, temperature: float, repetition: float, epsilon: float
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1, 40).astype(np.float32)
    history = rng.integers(0, 40, 30).astype(np.uint32)
    sampling = msgspec.structs.replace(PENALISED, temperature=temperature, repetition_penalty=repetition)
    moved = (logits + rng.uniform(-epsilon / 2, epsilon / 2, 40)).astype(np.float32)
    for index in range(4):
        wanted = Draw(sampling, 0, index, history, 20)
        assert penalised_gap(logits, draw(moved, wanted), wanted) <= epsilon * (1 + 1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_token_beside_the_mask_is_refused_and_one_within_it_judged_among_its_like(temperature: float) -> None:
    logits = np.asarray([9.0, 1.0, 1.1, -3.0], np.float32)
    mask = mask_of(np.asarray([False, True, True, False]))
    for index in range(20):
        wanted = Draw(Sampling(temperature=temperature, seed=3), 0, index, mask=mask)
        assert penalised_gap(logits, draw(logits, wanted), wanted) == 0
        assert penalised_gap(logits, 0, wanted) == penalised_gap(logits, 3, wanted) == math.inf
    assert penalised_gap(logits, 1, Draw(Sampling(temperature=0), 0, 0, mask=mask)) == pytest.approx(0.1)


def test_the_greedy_gap_is_the_distance_to_the_best() -> None:
    logits = np.asarray([1.0, 4.0, 3.75], np.float32)
    greedy = Sampling(temperature=0)
    assert [gap(logits, token, greedy, 0, 0) for token in range(3)] == [3.0, 0.0, 0.25]


def test_the_seeded_gap_of_two_tokens_is_the_logit_change_that_moves_the_border_to_u() -> None:
    # Two tokens, p and 1 - p: the border lies at sigmoid(d); the other token needs |logit(u) - d|.
    for index in range(30):
        sampling = Sampling(temperature=1.0, seed=9)
        logits = np.asarray([3.0, 0.0], np.float32)
        u = uniform(9, 0, index)
        needed = math.log(u / (1 - u)) - 3.0
        drawn = draw(logits, Draw(sampling, 0, index))
        assert drawn == int(needed >= 0)
        assert gap(logits, drawn, sampling, 0, index) == 0.0
        if needed < 0:
            # The second token may also overtake the first, at a distance of 3.
            found = gap(logits, 1, sampling, 0, index)
            assert found == pytest.approx(min(-needed, 3.0), abs=0.01)


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.5, 1.0, 2.0]),
    st.sampled_from([0, 1, 4]),
    st.sampled_from([1.0, 0.9, 0.4]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from([0.02, 0.2, 0.5]),
)
def test_no_draw_from_moved_logits_is_ever_accused(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, epsilon: float
) -> None:
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 1.5, 24).astype(np.float32)
    moved = (logits + generator.choice([-epsilon / 2, epsilon / 2], 24)).astype(np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    for index in range(12):
        token = draw(moved, Draw(sampling, 0, index))
        assert gap(logits, token, sampling, 0, index) <= epsilon * 1.001 + 1e-4


@pytest.mark.parametrize(
    "sampling", [Sampling(top_k=2), Sampling(top_p=0.5), Sampling(min_p=0.5)], ids=["top_k", "top_p", "min_p"]
)
def test_a_token_that_the_filters_drop_by_far_is_refused(sampling: Sampling) -> None:
    logits = np.asarray([5.0, 4.8, 0.0, -1.0], np.float32)
    for index in range(50):
        assert gap(logits, 2, sampling, 0, index) > 1.0
