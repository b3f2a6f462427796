"""The real default model: logits against transformers, and a generated text under the reference pass.

Tolerance in bf16, teacher-forced over text that the model itself continues: mean |Δ| to transformers' eager
bf16 at most 0.02 logit, the largest 1.0 (8 units in the last place of a logit above 16), and no further from
fp32 than transformers' bf16 is (x 1.1). The native engine keeps attention in fp32, where transformers rounds: its
distance to transformers' bf16 may be what that has to fp32.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import reference_logits
from runners import Runner, runner_of

from kvferry.engine.reference import ReferencePass
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch_runner import TorchRunner
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.messages import Sampling

LENGTH = 200
TABLE = np.random.default_rng(2).permutation(40).astype(np.int32)


@pytest.fixture(scope="module", params=["torch", "native"])
def runner(request: pytest.FixtureRequest, model_dir: Path) -> Runner:
    return runner_of(request.param, EngineSettings(model_dir, num_blocks=80, max_model_len=1024, threads=1))


def generate(runner: Runner, prompt: np.ndarray, sampling: Sampling, count: int) -> list[int]:
    tokens: list[int] = []
    chunk, start = prompt, 0
    for index in range(count):
        step = SequenceStep(0, chunk, start, TABLE, Draw(sampling, 0, index))
        token = runner.execute(StepPlan((step,))).tokens[0]
        assert token is not None
        tokens.append(token)
        start += len(chunk)
        chunk = np.asarray([token], np.uint32)
    return tokens


@pytest.fixture(scope="module")
def text(runner: Runner) -> np.ndarray:
    """Token ids that the model finds likely: a few random ones and its own seeded continuation."""
    prompt = np.random.default_rng(1).integers(100, runner.vocab_size, 8).astype(np.uint32)
    own = generate(runner, prompt, Sampling(temperature=0.7, seed=1), LENGTH - 8)
    return np.asarray([*prompt, *own], np.uint32)


def test_logits_agree_with_transformers(model_dir: Path, runner: Runner, text: np.ndarray) -> None:
    theirs = reference_logits(model_dir, text.tolist(), torch.bfloat16)
    wide = reference_logits(model_dir, text.tolist(), torch.float32)
    rounding = (theirs - wide).abs()
    mean, largest = (0.02, 1.0) if isinstance(runner, TorchRunner) else (rounding.mean(), rounding.max())
    cuts = {
        "one shot": [0, LENGTH],
        "chunked": [0, 64, 128, 192, LENGTH],
        "prefill then decode": [0, 180, *range(181, LENGTH + 1)],
    }
    for name, borders in cuts.items():
        parts = [
            torch.from_numpy(runner.logits(StepPlan((SequenceStep(0, text[start:end], start, TABLE),)))[0])
            for start, end in itertools.pairwise(borders)
        ]
        found = torch.cat(parts)
        assert (found - theirs).abs().mean() <= mean, name
        assert (found - theirs).abs().max() <= largest, name
        assert (found - wide).abs().mean() <= 1.1 * (theirs - wide).abs().mean(), name


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=0), Sampling(temperature=0.8, top_p=0.95, seed=7)], ids=["greedy", "seeded"]
)
def test_the_reference_pass_accepts_what_it_generates(
    model_dir: Path, runner: Runner, text: np.ndarray, sampling: Sampling
) -> None:
    prompt = text[:50]
    generated = generate(runner, prompt, sampling, 64)
    reference = ReferencePass(TorchRunner(EngineSettings(model_dir, num_blocks=40, max_model_len=512, threads=1)))
    verdict = reference.check(prompt.tolist(), generated, sampling, 0)
    assert verdict.accepted
    # Negative control: the same text with one token swapped for an unrelated one is refused.
    wrong = [*generated[:30], (generated[30] + runner.vocab_size // 2) % runner.vocab_size, *generated[31:]]
    assert not reference.check(prompt.tolist(), wrong, sampling, 0).accepted
