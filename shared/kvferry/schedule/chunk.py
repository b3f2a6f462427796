"""How many tokens a step may compute: bounded by a setting, and by the time that a step may take.

A token costs more the more context it attends to: at 32,000 positions a small model spends ten times as long on
attention as on its weights. So speeds are kept by context, in bands of `BAND_TOKENS`. A band that no step has been in
yet is expected to be slower than the nearest measured one before it by as much as its context is longer. That is too
much rather than too little, for a part of a token's cost does not depend on its context; the first step corrects it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

STEP_TARGET_S: Final = 0.3  # a cancel waits for at most one step
FIRST_TOKENS: Final = 128  # until something is measured: short even on a slow or crowded core
SMOOTHING: Final = 0.3
MIN_RATE_TOKENS: Final = 32  # steps with fewer rows say nothing about prefill speed, unless they may not have more
BAND_TOKENS: Final = 1024


class ChunkBudget:
    """Adapts the token budget so that a step stays near `target_s`, from the speed of the steps before."""

    def __init__(self, max_num_batched_tokens: int, block_size: int, target_s: float = STEP_TARGET_S) -> None:
        self._max_tokens = max_num_batched_tokens
        self._block_size = block_size
        self._target_s = target_s
        self._rates: dict[int, float] = {}  # tokens per second, by band of context
        self.tokens_per_s = 0.0  # over all contexts; 0 until measured

    def tokens(self, start: int = 0) -> int:
        """Rows from position `start` on that fit one step, a multiple of the block size where there is room for one."""
        band = start // BAND_TOKENS
        fitting = int(self._rate(band) * self._target_s) if self._rates else FIRST_TOKENS // (band + 1)
        if fitting < self._max_tokens:
            # To the nearest block, not down: a short step is slow for each of its rows, so that a budget which is once
            # small would stay so.
            fitting = (fitting + self._block_size // 2) // self._block_size * self._block_size
        return max(min(self._block_size, self._max_tokens), min(self._max_tokens, fitting))

    def step(self, num_decoding: int = 0) -> StepBudget:
        """The budget of the next step, beside `num_decoding` rows that it has in any case."""
        return StepBudget(self, num_decoding)

    def observe(self, parts: Iterable[tuple[int, int]], seconds: float) -> None:
        """Learn from a step of prefill rows, as (start, number of rows) of each of its sequences."""
        rows: Counter[int] = Counter()
        least = MIN_RATE_TOKENS
        for start, count in parts:
            rows[start // BAND_TOKENS] += count
            least = min(least, self.tokens(start))
        if rows.total() < least or seconds <= 0:
            return
        self.tokens_per_s = _smoothed(self.tokens_per_s, rows.total() / seconds)
        # By how much the step was faster than the bands' rates said: each of them is taken to be faster by as much.
        rates = {band: self._rate(band) for band in rows}
        faster = sum(count / rates[band] for band, count in rows.items()) / seconds
        for band, rate in rates.items():
            self._rates[band] = _smoothed(self._rates.get(band, 0.0), rate * faster)

    def _rate(self, band: int) -> float:
        """Tokens per second in a band; without any measurement it tells bands apart and nothing more."""
        if band in self._rates:
            return self._rates[band]
        if not self._rates:
            return 1.0 / (band + 1)
        before = max((known for known in self._rates if known < band), default=None)
        if before is not None:
            return self._rates[before] * (before + 1) / (band + 1)
        return self._rates[min(self._rates)]  # with less context no slower


class StepBudget:
    """What is left of one step, while its sequences take their rows."""

    def __init__(self, chunk: ChunkBudget, num_decoding: int) -> None:
        self._chunk = chunk
        self._num_decoding = num_decoding
        self._share = 1.0

    def take(self, start: int, wanted: int) -> int:
        """How many of the `wanted` rows from position `start` on the step computes; 0 if it is full."""
        whole = max(1, self._chunk.tokens(start) - self._num_decoding)
        rows = min(wanted, round(self._share * whole))
        self._share -= rows / whole
        return rows


def _smoothed(before: float, measured: float) -> float:
    return before + (measured - before) * (SMOOTHING if before else 1.0)
