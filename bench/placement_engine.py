"""How long an engine takes, fitted to what `bench/engine.py` measures."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class EngineRates:
    """Seconds of prefill and decode on one worker, and what KV costs to keep and move."""

    prefill_token_s: float
    prefill_context_s: float  # for each token and each position before it
    step_base_s: float
    step_sequence_s: float
    step_context_s: float  # for each position that a step's sequences look back at
    link_bytes_per_s: float = 1.0e9
    kv_token_bytes: int = 23_040
    num_blocks: int = 5_825  # of 32 tokens: 4 GiB of KV of SmolLM2-135M
    chunk_tokens: int = 512

    @classmethod
    def fit(cls, prefill_512: float, prefill_2048: float, decode_1: float, decode_8: float) -> EngineRates:
        """From tok/s: prompts of 512 and 2,048 tokens, 1 and 8 streams at a context of 256."""
        short, long = 512 / prefill_512, 2048 / prefill_2048
        quadratic = max(0.0, (long - 4 * short) / (2048**2 / 2 - 4 * 512**2 / 2))
        one, eight = 1 / decode_1, 8 / decode_8
        slope = max(0.0, (eight - one) / 7)
        # A third of what a sequence adds is taken for its 256 positions, the rest for its own row.
        return cls(short / 512 - quadratic * 256, quadratic, one - slope, slope * 2 / 3, slope / 3 / 256)

    @classmethod
    def read(cls, path: Path) -> EngineRates:
        """From JSON with the arguments of `fit`, and any other field of this class."""
        measured = json.loads(path.read_text(encoding="utf-8"))
        fitted = cls.fit(*(measured.pop(name) for name in ("prefill_512", "prefill_2048", "decode_1", "decode_8")))
        return cls(**({name: getattr(fitted, name) for name in cls.__slots__} | measured))

    def prefill_s(self, num_tokens: int, context: int) -> float:
        """Of `num_tokens` after `context` positions whose KV is there."""
        return num_tokens * (self.prefill_token_s + self.prefill_context_s * (context + num_tokens / 2))

    def step_s(self, num_sequences: int, context: float) -> float:
        """Of one decode step; `context` is the sum over its sequences."""
        return self.step_base_s + self.step_sequence_s * num_sequences + self.step_context_s * context
