"""What placement expected of one attempt, compared with what came. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvferry_gateway.placement.decision import Reason
from kvferry_gateway.placement.estimates import ForecastError

MIN_TOKENS: Final = 8  # of an attempt that tells an ITL: the hand-off's own gap weighs too much in fewer


@dataclass(slots=True)
class Forecast:
    """Each of the two figures teaches its `ForecastError` once."""

    reason: Reason
    placed_at: float
    ttft_error: ForecastError
    itl_error: ForecastError
    first_token_at: float | None = None

    def began(self, now: float) -> None:
        """New tokens have come; only the first of them counts here."""
        if self.first_token_at is None:
            self.first_token_at = now
            self.ttft_error.observe(self.reason.ttft_s, now - self.placed_at)

    def ended(self, num_tokens: int, last_token_at: float) -> None:
        """The attempt is complete, with so many tokens."""
        if self.first_token_at is not None and num_tokens >= MIN_TOKENS:
            self.itl_error.observe(self.reason.itl_s, (last_token_at - self.first_token_at) / (num_tokens - 1))
