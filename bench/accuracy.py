"""Accuracy of the engines on real text, by teacher forcing: `python -m bench.accuracy MODEL_DIR`.

The text is the project's own documents, cut into windows. For every position each candidate's logits are compared
with those of Hugging Face transformers in fp32: mean and largest difference, how often the most likely token is
the same, and the perplexity. Hugging Face in bf16 is the yardstick of what rounding alone costs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
WINDOW: Final = 1024
POSITIONS: Final = 8192

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
        difference = np.abs(logits - reference)
        self.positions += len(logits)
        self.error_sum += float(difference.mean(axis=1, dtype=np.float64).sum())
        self.largest_error = max(self.largest_error, float(difference.max()))
        self.agreeing += int((logits.argmax(1) == reference.argmax(1)).sum())
        rows = logits[:-1].astype(np.float64)
        top = rows.max(1)
        normaliser = top + np.log(np.exp(rows - top[:, None]).sum(1))
        self.loss_sum += float((normaliser - rows[np.arange(len(rows)), tokens[1:].astype(np.int64)]).sum())
        self.predictions += len(rows)

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
    """Hugging Face's own model, run eagerly."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=getattr(torch, dtype), attn_implementation="eager"
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
    """Every candidate over all windows, against the reference."""
    found = {name: Accuracy() for name in ("reference", *candidates)}
    for tokens in texts:
        expected = reference(tokens)
        found["reference"].add(expected, expected, tokens)
        for name, forward in candidates.items():
            found[name].add(forward(tokens), expected, tokens)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--positions", type=int, default=POSITIONS)
    arguments = parser.parse_args()
    texts = windows(arguments.model_dir, arguments.positions)
    with ExitStack() as stack:
        candidates = {
            "HF bf16": transformers_forward(arguments.model_dir, "bfloat16"),
            "native bf16": stack.enter_context(native_forward(arguments.model_dir)),
            "native int8": stack.enter_context(native_forward(arguments.model_dir, quantization="int8")),
        }
        found = compare(texts, transformers_forward(arguments.model_dir, "float32"), candidates)
    report = Report("accuracy", {"reference": "transformers in fp32", "positions": str(len(texts) * WINDOW)})
    for name, accuracy in found.items():
        report.add(f"{name}: perplexity", accuracy.perplexity)
        if name != "reference":
            report.add(f"{name}: mean |logit error|", accuracy.mean_error)
            report.add(f"{name}: largest |logit error|", accuracy.largest_error)
            report.add(f"{name}: same most likely token", accuracy.top1)
    print(report.render())
    report.write()


if __name__ == "__main__":
    main()
