"""Accuracy of the engines on real text, by teacher forcing: `python -m bench.accuracy MODEL_DIR`.

The text is the project's own documents, cut into windows. For every position each candidate's logits are compared
with those of Hugging Face transformers in fp32: mean and largest difference, how often the most likely token is
the same, and the perplexity. Hugging Face in bf16 is the yardstick of what rounding alone costs.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from bench.report import Report
from kvferry.schedule.step import SequenceStep, StepPlan
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

ROOT: Final = Path(__file__).resolve().parent.parent
TEXTS: Final = ("docs/architecture.md", "docs/protocol.md", "README.md", "docs/configuration.md")
WINDOW: Final = 512
POSITIONS: Final = 8192
JOBS: Final = 2  # models that run at the same time
SLICE: Final = 16  # rows whose logits fit into a processor's cache
HF_BF16: Final = "HF bf16"
NATIVE_BF16: Final = "native bf16"
NATIVE_INT8: Final = "native int8"
# What is promised: of bf16, by what transformers' bf16 costs; of int8, by figures.
ROUNDING_SHARE: Final = 1.1
TOP1_LOSS: Final = 0.005
PERPLEXITY_RATIO: Final = 1.01
INT8_MEAN_ERROR: Final = 0.4
INT8_TOP1: Final = 0.92
INT8_PERPLEXITY_RATIO: Final = 1.03

Logits: TypeAlias = npt.NDArray[np.float32]  # [positions, vocab]
Tokens: TypeAlias = npt.NDArray[np.uint32]
Forward: TypeAlias = Callable[[Tokens], Logits]


@dataclass(slots=True)
class Accuracy:
    """Sums over positions; the properties are what is reported."""

    positions: int = 0
    error_sum: float = 0.0  # of |logit - reference|, mean over the vocabulary
    largest_error: float = 0.0
    agreeing: int = 0  # positions with the reference's most likely token
    loss_sum: float = 0.0  # nats
    predictions: int = 0

    def add(self, logits: Logits, reference: Logits, tokens: Tokens) -> None:
        """One window: row i of both predicts tokens[i + 1]."""
        for start in range(0, len(logits), SLICE):
            rows, expected = logits[start : start + SLICE], reference[start : start + SLICE]
            difference = np.abs(rows - expected)
            self.positions += len(rows)
            self.error_sum += float(difference.mean(axis=1, dtype=np.float64).sum())
            self.largest_error = max(self.largest_error, float(difference.max()))
            self.agreeing += int((rows.argmax(1) == expected.argmax(1)).sum())
            following = tokens[start + 1 : start + 1 + len(rows)].astype(np.int64)
            top = rows.max(1, keepdims=True)
            normaliser = top[:, 0] + np.log(np.exp(rows - top).sum(1, dtype=np.float64))
            predicted = rows[np.arange(len(following)), following]
            self.loss_sum += float((normaliser[: len(following)] - predicted).sum())
            self.predictions += len(following)

    @property
    def mean_error(self) -> float:
        return self.error_sum / self.positions

    @property
    def top1(self) -> float:
        return self.agreeing / self.positions

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss_sum / self.predictions)


def windows(model_dir: Path, positions: int = POSITIONS) -> list[Tokens]:
    """Windows of real text, each `WINDOW` tokens; together at least `positions`."""
    text = "\n\n".join((ROOT / name).read_text(encoding="utf-8") for name in TEXTS)
    tokens = np.asarray(Tokenizer(ModelDir(model_dir)).encode(text, add_special_tokens=False), np.uint32)
    count = -(-positions // WINDOW)
    if len(tokens) < count * WINDOW:
        raise RuntimeError(f"the texts have {len(tokens)} tokens, {count * WINDOW} are needed")
    return [tokens[index * WINDOW : (index + 1) * WINDOW] for index in range(count)]


def transformers_forward(model_dir: Path, dtype: str) -> Forward:
    """Hugging Face's own model. bf16 is eager, since its rounding is the yardstick; fp32 takes the faster attention."""
    import torch
    from transformers import AutoModelForCausalLM

    attention = "sdpa" if dtype == "float32" else "eager"
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation=attention
    )
    model.eval()

    def forward(tokens: Tokens) -> Logits:
        with torch.inference_mode():
            logits = model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
            return np.asarray(logits.float().numpy())

    return forward


@contextmanager
def native_forward(model_dir: Path, threads: int = 1, quantization: str = "none") -> Iterator[Forward]:
    """The native engine, in chunks of 256 as a scheduler would cut them."""
    from kvferry.engine.native.runner import NativeRunner
    from kvferry.engine.settings import EngineSettings

    runner = NativeRunner(
        EngineSettings(
            model_dir, dtype="bfloat16", num_blocks=WINDOW // 16, max_model_len=WINDOW, threads=threads,
            quantization=quantization,
        )
    )  # fmt: skip
    table = np.arange(WINDOW // 16, dtype=np.int32)[::-1].copy()

    def forward(tokens: Tokens) -> Logits:
        parts = [
            np.asarray(runner.logits(StepPlan((SequenceStep(0, tokens[start : start + 256], start, table),)))[0])
            for start in range(0, len(tokens), 256)
        ]
        return np.concatenate(parts)

    yield forward
    runner.close()


def compare(texts: Sequence[Tokens], reference: Forward, candidates: Mapping[str, Forward]) -> dict[str, Accuracy]:
    """Every candidate over all windows, against the reference. The models run side by side."""
    found = {name: Accuracy() for name in ("reference", *candidates)}
    with ThreadPoolExecutor(JOBS) as pool:
        for tokens in texts:
            expecting = pool.submit(reference, tokens)
            running = {name: pool.submit(forward, tokens) for name, forward in candidates.items()}
            expected = expecting.result()
            adding = [pool.submit(found["reference"].add, expected, expected, tokens)]
            adding += [pool.submit(found[name].add, each.result(), expected, tokens) for name, each in running.items()]
            for added in adding:
                added.result()
    return found


def measure(model_dir: Path, positions: int = POSITIONS) -> dict[str, Accuracy]:
    """The reference, transformers in bf16, and the native engine in bf16 and int8."""
    texts = windows(model_dir, positions)
    with ExitStack() as stack:
        candidates = {
            HF_BF16: transformers_forward(model_dir, "bfloat16"),
            NATIVE_BF16: stack.enter_context(native_forward(model_dir)),
            NATIVE_INT8: stack.enter_context(native_forward(model_dir, quantization="int8")),
        }
        return compare(texts, transformers_forward(model_dir, "float32"), candidates)


def report_of(found: Mapping[str, Accuracy]) -> Report:
    """With the limits that are promised."""
    report = Report("accuracy", {
        "reference": "transformers in fp32", "positions": f"{found['reference'].positions}, in windows of {WINDOW}",
    })  # fmt: skip
    yardstick, exact = found[HF_BF16], found["reference"]
    limits = {
        NATIVE_BF16: (
            ROUNDING_SHARE * yardstick.mean_error, yardstick.top1 - TOP1_LOSS, PERPLEXITY_RATIO * exact.perplexity,
        ),
        NATIVE_INT8: (INT8_MEAN_ERROR, INT8_TOP1, INT8_PERPLEXITY_RATIO * exact.perplexity),
    }  # fmt: skip
    for name, accuracy in found.items():
        mean, top1, perplexity = limits.get(name, (None, None, None))
        report.add(f"{name}: perplexity", accuracy.perplexity, "", perplexity)
        if name != "reference":
            report.add(f"{name}: mean logit error", accuracy.mean_error, "", mean)
            report.add(f"{name}: largest logit error", accuracy.largest_error)  # one logit's: chance, and no limit
            report.add(f"{name}: same most likely token", accuracy.top1, "", top1, at_least=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--positions", type=int, default=POSITIONS)
    arguments = parser.parse_args()
    report = report_of(measure(arguments.model_dir, arguments.positions))
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
