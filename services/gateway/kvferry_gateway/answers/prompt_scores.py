"""Log-probabilities of one prompt's tokens, as workers tell them: in pieces, doubled, in any order, by any attempt."""

from __future__ import annotations

import asyncio

import numpy as np
import numpy.typing as npt

from kvferry.wire.fields import TokenArray
from kvferry.wire.logprobs import PromptLogprobs
from kvferry.wire.sampling import Scoring


class PromptScores:
    """Rows are the prompt's tokens by position; the first one has no log-probability, and nothing in its row."""

    def __init__(self, num_tokens: int, num_top: int) -> None:
        self.num_top = num_top
        self.ranks: TokenArray = np.zeros(num_tokens, np.uint32)
        self.top_tokens: TokenArray = np.zeros((num_tokens, num_top), np.uint32)
        self.logprobs: npt.NDArray[np.float32] = np.zeros((num_tokens, 1 + num_top), np.float32)
        self.complete = asyncio.Event()
        self._known = np.zeros(num_tokens, np.bool_)
        self._known[0] = True
        self._advance(0)

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def lacking(self) -> Scoring | None:
        """What a worker is still to be asked for."""
        return None if self.complete.is_set() else Scoring(self.num_top, self.next)

    def take(self, found: PromptLogprobs) -> bool:
        """What is known without a gap stays. False: of other tokens, or not as was asked for."""
        if found.end > len(self) or found.top_tokens.shape[1] != self.num_top:
            return False
        start = max(found.start, self.next)
        if start < found.end:
            rows, fresh = slice(start, found.end), found.part(start, found.end)
            self.ranks[rows] = fresh.ranks
            self.top_tokens[rows] = fresh.top_tokens
            self.logprobs[rows] = fresh.logprobs
            self._known[rows] = True
            self._advance(self.next)
        return True

    def _advance(self, start: int) -> None:
        unknown = np.flatnonzero(~self._known[start:])
        self.next = start + int(unknown[0]) if len(unknown) else len(self)  # position of the first that is not known
        if self.next == len(self):
            self.complete.set()
