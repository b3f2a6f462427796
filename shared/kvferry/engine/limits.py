"""What a plan and a KV piece may name, and where positions lie in the cache. Pure numpy, for every runner.

All checks raise RuntimeError: a plan outside the cache is a fault of the scheduler, not of a client.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.schedule.step import MAX_LOGPROBS, BlockTable, KVFormat, Score, SequenceStep, StepPlan
from kvferry.wire.frame import Piece

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds of one runner."""

    kv_format: KVFormat
    num_blocks: int
    max_model_len: int
    vocab_size: int

    def check_plan(self, plan: StepPlan) -> None:
        """Nothing is written for a plan that fails here."""
        for step in plan.steps:
            end = step.start + len(step.tokens)
            if not len(step.tokens):
                raise RuntimeError(f"sequence {step.sequence_id}: a step without tokens")
            if end > self.max_model_len:
                raise RuntimeError(
                    f"sequence {step.sequence_id}: {end} positions, max_model_len is {self.max_model_len}"
                )
            if int(step.tokens.max()) >= self.vocab_size:
                raise RuntimeError(f"sequence {step.sequence_id}: a token outside the vocabulary")
            self._check_table(step.block_table, step.start, end)
            if step.score is not None:
                self._check_score(step, step.score)

    def check_piece(self, piece: Piece, block_table: BlockTable, num_bytes: int) -> None:
        """A piece must lie within the model and the table, and a buffer have exactly its size."""
        kv_format = self.kv_format
        if not 0 <= piece.layer_start < piece.layer_end <= kv_format.num_layers:
            raise RuntimeError(f"layers {piece.layer_start} to {piece.layer_end} outside the model")
        if not 0 <= piece.head_start < piece.head_end <= kv_format.num_kv_heads:
            raise RuntimeError(f"KV heads {piece.head_start} to {piece.head_end} outside the model")
        self._check_table(block_table, piece.token_start, piece.token_end)
        if (expected := piece.num_bytes(kv_format.head_dim, kv_format.dtype)) != num_bytes:
            raise RuntimeError(f"KV piece of {expected} bytes, buffer of {num_bytes}")

    def _check_score(self, step: SequenceStep, score: Score) -> None:
        rows = step.scored_rows
        if not 0 <= rows.start < rows.stop <= len(step.tokens) or not 0 <= score.num_top <= MAX_LOGPROBS:
            raise RuntimeError(f"sequence {step.sequence_id}: rows {rows} of {len(step.tokens)} to be scored")
        if int(score.targets.max()) >= self.vocab_size:
            raise RuntimeError(f"sequence {step.sequence_id}: a scored token outside the vocabulary")

    def _check_table(self, block_table: BlockTable, start: int, end: int) -> None:
        if not 0 <= start < end <= len(block_table) * self.kv_format.block_size:
            raise RuntimeError(f"positions {start} to {end} outside a table of {len(block_table)} blocks")
        if int(block_table.min()) < 0 or int(block_table.max()) >= self.num_blocks:
            raise RuntimeError(f"block table names a block outside the pool of {self.num_blocks}")


def slots_of(block_table: BlockTable, start: int, end: int, block_size: int) -> Slots:
    """Cache slots [end - start] of positions `start` to `end` (exclusive)."""
    positions = np.arange(start, end, dtype=np.int64)
    slots: Slots = block_table.astype(np.int64)[positions // block_size] * block_size + positions % block_size
    return slots
