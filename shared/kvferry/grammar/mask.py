"""Where one choice stands in its grammar, as a mask over the tokens that may come next.

The state follows from the grammar and the generated tokens alone: a worker that takes a choice over replays them.
"""

from __future__ import annotations

import threading
from typing import Final

import llguidance
import numpy as np

from kvferry.schedule.step import MaskWords
from kvferry.wire.fields import TokenArray

WORD_BITS: Final = 32
MAX_FAULT_CHARS: Final = 300
TOKENS_AT_ONCE: Final = 256  # of a replay: it holds the GIL for less than a millisecond


class GrammarMask:
    """Implements `TokenMask`. One `advance` at a time, on any thread."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, after: int | None) -> None:
        """`matcher` is the mask's own. `after`: the token behind which it begins; until then any token may come."""
        self.fault: str | None = None
        self._matcher = matcher
        self._words = np.zeros(-(-vocab_size // WORD_BITS), np.uint32)
        self._address: int = self._words.__array_interface__["data"][0]
        self._after = after
        self._num_taken = 0  # generated tokens
        self._known = threading.Event()

    def begin(self) -> None:
        self._known.clear()

    def advance(self, generated: TokenArray) -> None:
        try:
            if self.fault is None:
                self._take(generated[self._num_taken :].tolist())
                self._num_taken = len(generated)
        except Exception as error:  # never leaves a step waiting
            self.fault = f"{type(error).__name__}: {error}"[:MAX_FAULT_CHARS]
        finally:
            self._known.set()

    def words(self) -> MaskWords | None:
        self._known.wait()
        return None if self.fault is not None or self._after is not None else self._words

    def _take(self, tokens: list[int]) -> None:
        if self._after is not None:
            if self._after not in tokens:
                return
            tokens = tokens[tokens.index(self._after) + 1 :]
            self._after = None
        for start in range(0, len(tokens), TOKENS_AT_ONCE):
            if not self._matcher.consume_tokens(tokens[start : start + TOKENS_AT_ONCE]):
                self._fail("a generated token does not follow it")
                return
        self._matcher.unsafe_compute_mask_ptr(self._address, self._words.nbytes)
        if self._matcher.is_error() or not self._words.any():
            self._fail("no text can follow")

    def _fail(self, otherwise: str) -> None:
        error = self._matcher.get_error().replace("<non-verbose/>", "").strip()
        # "NoExtension…": the grammar is at an end that no text reaches.
        self.fault = (otherwise if not error or error.startswith("NoExtension") else error)[:MAX_FAULT_CHARS]
