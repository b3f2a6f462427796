"""Logits against transformers, by teacher forcing, for every family and feature.

The torch runner rounds where transformers does: its logits, of a standard deviation of about 1, are transformers' of
the same dtype to 2e-4 in fp32 (sums in another order) and 0.15 in bf16. The native one keeps attention in fp32, so it
is another rounding of the same fp32 model, which it is judged by: see
`test_rounding_costs_no_more_than_in_transformers`. However a text is cut into steps, it must give the bits of one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, Shape, build, reference_logits
from runners import NATIVE, Runner, native_library, runner_of
from transformers import AutoModelForCausalLM

from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.schedule.step import SequenceStep, StepPlan

LENGTH = 150
NUM_BLOCKS = 32
LIMITS = {"float32": 2e-4, "bfloat16": 0.15}
ENGINES = [("torch", "float32"), ("torch", "bfloat16"), *((engine, "bfloat16") for engine in NATIVE)]
TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)
OTHER = np.random.default_rng(6).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)
# Rounding is judged over that many random models and texts of each shape.
SEEDS, TEXTS = 3, 12
SHARE = 1.1  # of transformers' own error in bf16
BLOCKS = np.random.default_rng(7).permutation(NUM_BLOCKS).astype(np.int32)
Errors = npt.NDArray[np.float32]  # [texts, LENGTH, vocab], absolute, against fp32


@dataclass
class Case:
    runner: Runner
    logits: torch.Tensor  # of TOKENS, as they must be
    other: torch.Tensor  # of OTHER
    limit: float

    def run(self, *steps: tuple[int, np.ndarray, int, int]) -> list[torch.Tensor]:
        """Each step: (sequence, its text, start, end) -> logits of those rows."""
        return run(self.runner, *steps)

    def close_to(self, found: torch.Tensor, expected: torch.Tensor) -> None:
        assert (found - expected).abs().max().item() <= self.limit


def run(runner: Runner, *steps: tuple[int, np.ndarray, int, int]) -> list[torch.Tensor]:
    plan = StepPlan(
        tuple(
            SequenceStep(sequence, text[start:end], start, table_of(sequence)) for sequence, text, start, end in steps
        )
    )
    return [torch.from_numpy(rows) for rows in runner.logits(plan)]


def table_of(sequence: int) -> npt.NDArray[np.int32]:
    return BLOCKS[sequence * 10 : sequence * 10 + 10]


@pytest.fixture(
    params=[(shape, *engine) for shape in SHAPES for engine in ENGINES],
    ids=lambda p: f"{p[0].name}-{p[1]}-{p[2]}",
    scope="module",
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    shape, engine, dtype = request.param
    directory = build(shape, Path(tmp_path_factory.mktemp(shape.name)))
    runner = runner_of(engine, EngineSettings(directory, dtype=dtype, num_blocks=NUM_BLOCKS, threads=1))
    if isinstance(runner, TorchRunner):
        wanted = [reference_logits(directory, text.tolist(), getattr(torch, dtype)) for text in (TOKENS, OTHER)]
        yield Case(runner, wanted[0], wanted[1], LIMITS[dtype])
    else:
        wanted = [run(runner, (0, text, 0, LENGTH))[0] for text in (TOKENS, OTHER)]
        yield Case(runner, wanted[0], wanted[1], 0.0)
    runner.close()


def test_one_shot_prefill_agrees(case: Case) -> None:
    (found,) = case.run((0, TOKENS, 0, LENGTH))
    case.close_to(found, case.logits)
    # Logits of another text are far off: the tolerance can fail.
    assert (found - case.other).abs().max().item() > max(1.0, 10 * case.limit)


@pytest.mark.parametrize("size", [1, 7, 64, 65])
def test_chunked_prefill_agrees_at_any_chunk_size(case: Case, size: int) -> None:
    found = [case.run((0, TOKENS, at, min(at + size, LENGTH)))[0] for at in range(0, LENGTH, size)]
    case.close_to(torch.cat(found), case.logits)


def test_a_cached_prefix_shared_by_block_table_agrees(case: Case) -> None:
    case.run((0, TOKENS, 0, 64))
    # A second sequence has the first four blocks in common and blocks of its own behind them.
    shared = np.concatenate((table_of(0)[:4], table_of(1)[:6]))
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


@dataclass
class Rounding:
    """What rounding costs over all models and texts of one shape."""

    mean: float
    largest: float  # of a text, in the mean over all texts: the one largest of all is decided by chance

    @classmethod
    def of(cls, errors: list[Errors]) -> Rounding:
        every = np.concatenate(errors)
        return cls(float(every.mean()), float(every.max(axis=(1, 2)).mean()))

    def within(self, other: Rounding) -> bool:
        return self.mean <= SHARE * other.mean and self.largest <= SHARE * other.largest


def errors_of(shape: Shape, seed: int, folder: Path, engines: dict[str, dict[str, str]]) -> dict[str, Errors]:
    """Of each engine, and of transformers in bf16 as "transformers", on one random model."""
    directory = build(shape, folder / f"seed-{seed}", seed=seed)
    texts = np.random.default_rng(100 + seed).integers(0, VOCAB_SIZE, (TEXTS, LENGTH)).astype(np.uint32)

    def theirs(dtype: torch.dtype) -> Errors:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="eager")
        with torch.inference_mode():
            return np.asarray(model(torch.from_numpy(texts.astype(np.int64))).logits.float().numpy())

    def ours(name: str, fields: dict[str, str]) -> Errors:
        runner = runner_of(
            name, EngineSettings(directory, dtype="bfloat16", num_blocks=NUM_BLOCKS, threads=1, **fields)
        )
        logits = np.stack([run(runner, (0, text, 0, LENGTH))[0].numpy() for text in texts])
        runner.close()
        return logits

    wide = theirs(torch.float32)
    found = {"transformers": theirs(torch.bfloat16)}
    found |= {name: ours(name.removesuffix("-int8"), fields) for name, fields in engines.items()}
    return {name: np.abs(logits - wide) for name, logits in found.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_rounding_costs_no_more_than_in_transformers(shape: Shape, tmp_path: Path) -> None:
    """The distance to fp32, in the mean and at its largest, is not above that of transformers in bf16 by over 10 %."""
    native_library()  # or skip
    engines = {"torch": {}, **{name: {} for name in NATIVE}, "native-int8": {"quantization": "int8"}}
    pooled: dict[str, list[Errors]] = {}
    for seed in range(SEEDS):
        for name, errors in errors_of(shape, seed, tmp_path, engines).items():
            pooled.setdefault(name, []).append(errors)
    costs = {name: Rounding.of(errors) for name, errors in pooled.items()}
    theirs = costs["transformers"]
    for name in ("torch", *NATIVE):
        assert costs[name].within(theirs), f"{name}: {costs[name]}, transformers: {theirs}"
    # Negative controls: coarser arithmetic is told apart, by either figure.
    coarse = costs["native-int8"]
    assert not Rounding(coarse.mean, 0).within(theirs)
    assert not Rounding(0, coarse.largest).within(theirs)
