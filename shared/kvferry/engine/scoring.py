"""Scored rows of a step: what runners share when they tell how likely the tokens of a prompt are. Without torch.

Logits of all rows of a chunk would be a gigabyte with a large vocabulary, so they are made and read in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

from kvferry.schedule.step import Logprobs, SequenceStep, StepPlan
from kvferry.wire.logprobs import PromptLogprobs

MAX_LOGITS_BYTES: Final = 32 << 20  # of one piece, fp32


def scored_of(plan: StepPlan) -> dict[int, SequenceStep]:
    """Index of each sequence with rows to score -> its step, in plan order."""
    return {index: step for index, step in enumerate(plan.steps) if step.score is not None}


def pieces(rows: range, vocab_size: int) -> Iterator[range]:
    """Runs of rows whose logits fit `MAX_LOGITS_BYTES`."""
    most = max(1, MAX_LOGITS_BYTES // (4 * vocab_size))
    for start in range(rows.start, rows.stop, most):
        yield range(start, min(start + most, rows.stop))


def prompt_logprobs(start: int, rows: Sequence[Logprobs], num_top: int) -> PromptLogprobs:
    """As columns, of tokens from position `start` on."""
    return PromptLogprobs(
        start,
        np.array([row.rank for row in rows], np.uint32),
        np.array([row.top_tokens for row in rows], np.uint32).reshape(len(rows), num_top),
        np.array([(row.logprob, *row.top_logprobs) for row in rows], np.float32),
    )


def joined(parts: Sequence[PromptLogprobs]) -> PromptLogprobs:
    """Of consecutive pieces."""
    return PromptLogprobs(
        parts[0].start,
        np.concatenate([part.ranks for part in parts]),
        np.concatenate([part.top_tokens for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
    )
