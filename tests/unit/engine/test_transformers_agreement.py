"""Logits against transformers, by teacher forcing, for every family and feature.

Tolerance, of logits with a standard deviation of about 1: fp32 2e-4 (sums in another order); bf16 0.15 at
most and, in the mean over all logits, no further from fp32 than 1.1 times transformers' own bf16. The torch runner
rounds where transformers does; the native one keeps attention in fp32, so that its largest distance to transformers'
bf16 may be as large as that has to fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, build, reference_logits
from runners import NATIVE, Runner, runner_of

from kvferry.engine.settings import EngineSettings
from kvferry.schedule.step import SequenceStep, StepPlan

LENGTH = 150
NUM_BLOCKS = 32
LIMITS = {"float32": 2e-4, "bfloat16": 0.15}
ENGINES = [("torch", "float32"), ("torch", "bfloat16"), *((engine, "bfloat16") for engine in NATIVE)]
TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)
OTHER = np.random.default_rng(6).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)


@dataclass
class Case:
    runner: Runner
    tables: list[np.ndarray]
    logits: torch.Tensor  # transformers, the same dtype, of TOKENS
    other: torch.Tensor  # of OTHER
    wide: torch.Tensor  # transformers in fp32, of TOKENS
    limit: float

    def run(self, *steps: tuple[int, np.ndarray, int, int]) -> list[torch.Tensor]:
        """Each step: (sequence, its text, start, end) -> logits of those rows."""
        plan = StepPlan(
            tuple(
                SequenceStep(sequence, text[start:end], start, self.tables[sequence])
                for sequence, text, start, end in steps
            )
        )
        return [torch.from_numpy(rows) for rows in self.runner.logits(plan)]

    def close_to(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert (found - expected).abs().max().item() <= self.limit


@pytest.fixture(
    params=[(shape, *engine) for shape in SHAPES for engine in ENGINES],
    ids=lambda p: f"{p[0].name}-{p[1]}-{p[2]}",
    scope="module",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    shape, engine, dtype = request.param
    directory = build(shape, Path(tmp_path_factory.mktemp(shape.name)))
    runner = runner_of(engine, EngineSettings(directory, dtype=dtype, num_blocks=NUM_BLOCKS, threads=1))
    blocks = np.random.default_rng(7).permutation(NUM_BLOCKS).astype(np.int32)
    torch_dtype = getattr(torch, dtype)
    theirs = reference_logits(directory, TOKENS.tolist(), torch_dtype)
    wide = reference_logits(directory, TOKENS.tolist(), torch.float32)
    limit = LIMITS[dtype]
    if engine != "torch":
        limit = max(limit, (theirs - wide).abs().max().item())
    return Case(
        runner,
        [blocks[i * 10 : i * 10 + 10] for i in range(3)],
        theirs,
        reference_logits(directory, OTHER.tolist(), torch_dtype),
        wide,
        limit,
    )


def test_one_shot_prefill_agrees(case: Case) -> None:
    (found,) = case.run((0, TOKENS, 0, LENGTH))
    case.close_to(found, case.logits)
    # transformers' logits of another text are far off: the tolerance can fail.
    assert (found - case.other).abs().max().item() > 10 * case.limit


def test_rounding_costs_no_more_than_in_transformers(case: Case) -> None:
    (found,) = case.run((0, TOKENS, 0, LENGTH))
    own, theirs = (found - case.wide).abs().mean().item(), (case.logits - case.wide).abs().mean().item()
    assert own <= 1.1 * theirs + 1e-5


@pytest.mark.parametrize("size", [1, 7, 64, 65])
def test_chunked_prefill_agrees_at_any_chunk_size(case: Case, size: int) -> None:
    found = [case.run((0, TOKENS, at, min(at + size, LENGTH)))[0] for at in range(0, LENGTH, size)]
    case.close_to(torch.cat(found), case.logits)


def test_a_cached_prefix_shared_by_block_table_agrees(case: Case) -> None:
    case.run((0, TOKENS, 0, 64))
    # A second sequence has the first four blocks in common and blocks of its own behind them.
    shared = np.concatenate((case.tables[0][:4], case.tables[1][:6]))
    plan = StepPlan((SequenceStep(1, TOKENS[64:], 64, shared),))
    case.close_to(torch.from_numpy(case.runner.logits(plan)[0]), case.logits[64:])


def test_a_mixed_batch_of_prefill_and_decode_agrees(case: Case) -> None:
    case.run((0, TOKENS, 0, 100), (1, OTHER, 0, 40), (2, TOKENS, 0, 9))
    for step in range(8):
        # Decoding rows stand before, between and behind a growing chunk, at very different contexts.
        at = 40 + 5 * step
        found = case.run((2, TOKENS, 9 + step, 10 + step), (1, OTHER, at, at + 5), (0, TOKENS, 100 + step, 101 + step))
        case.close_to(found[0], case.logits[9 + step : 10 + step])
        case.close_to(found[1], case.other[at : at + 5])
        case.close_to(found[2], case.logits[100 + step : 101 + step])
