"""How many tokens a step may compute: bounded by a setting, and by the time that a step may take."""

from __future__ import annotations

from typing import Final

STEP_TARGET_S: Final = 0.3  # a cancel waits for at most one step
FIRST_TOKENS: Final = 128  # until something is measured: short even on a slow or crowded core
SMOOTHING: Final = 0.3
MIN_RATE_TOKENS: Final = 32  # steps with fewer rows say nothing about prefill speed


class ChunkBudget:
    """Adapts the token budget so that a step stays near `target_s`, from the speed of the steps before."""

    def __init__(self, max_num_batched_tokens: int, block_size: int, target_s: float = STEP_TARGET_S) -> None:
        self._max_tokens = max_num_batched_tokens
        self._block_size = block_size
        self._target_s = target_s
        self.tokens_per_s = 0.0  # 0 until measured

    @property
    def tokens(self) -> int:
        """Rows that the next step may have, a multiple of the block size where there is room for one."""
        if self.tokens_per_s == 0.0:
            return min(FIRST_TOKENS, self._max_tokens)
        fitting = int(self.tokens_per_s * self._target_s) // self._block_size * self._block_size
        return max(min(self._block_size, self._max_tokens), min(self._max_tokens, fitting))

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Learn from a step of `num_tokens` prefill rows."""
        if num_tokens < MIN_RATE_TOKENS or seconds <= 0:
            return
        rate = num_tokens / seconds
        self.tokens_per_s += (rate - self.tokens_per_s) * (SMOOTHING if self.tokens_per_s else 1.0)
