"""Log-probabilities beside tokens, and their columns (`LogprobColumns`) on both planes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvferry.errors import MalformedMessage
from kvferry.wire.fields import TokenArray, pack_tokens
from kvferry.wire.sampling import MAX_LOGPROBS
from kvferry.wire.tokens import LogprobColumns, PromptLogprobColumns


class TokenLogprobs(NamedTuple):
    """Natural logarithms of what the model gave a drawn token, and its best tokens, before any sampling field."""

    logprob: float  # of the drawn token
    top_tokens: tuple[int, ...]  # best first
    top_logprobs: tuple[float, ...]


def pack_logprobs(rows: Sequence[tuple[int, TokenLogprobs]]) -> LogprobColumns | None:
    """Columns for (row, its log-probabilities), rows rising; None for none at all."""
    if not rows:
        return None
    return LogprobColumns(
        pack_tokens([row for row, _ in rows]),
        pack_tokens([len(found.top_tokens) for _, found in rows]),
        pack_tokens([token for _, found in rows for token in found.top_tokens]),
        np.array([p for _, found in rows for p in (found.logprob, *found.top_logprobs)], "<f4").tobytes(),
    )


def unpack_logprobs(columns: LogprobColumns, num_rows: int) -> list[tuple[int, TokenLogprobs]]:
    """The reverse, of columns beside `num_rows` rows. Raises `MalformedMessage` for columns that don't fit."""
    sizes = [len(column) for column in (columns.rows, columns.counts, columns.top_tokens, columns.logprobs)]
    if any(size % 4 for size in sizes) or sizes[0] != sizes[1]:
        raise MalformedMessage("logprob columns of odd or unequal length")
    rows = np.frombuffer(columns.rows, "<u4").tolist()
    counts = np.frombuffer(columns.counts, "<u4").tolist()
    if any(count > MAX_LOGPROBS for count in counts) or 4 * sum(counts) != sizes[2]:
        raise MalformedMessage("logprob counts that don't fit their columns")
    if sizes[3] != sizes[0] + sizes[2]:
        raise MalformedMessage("logprob columns of unequal length")
    if any(row >= num_rows for row in rows) or any(a >= b for a, b in itertools.pairwise(rows)):
        raise MalformedMessage("logprobs of rows that are not there")
    tokens = np.frombuffer(columns.top_tokens, "<u4").tolist()
    logprobs = np.frombuffer(columns.logprobs, "<f4").tolist()
    found = []
    start = 0
    for place, (row, count) in enumerate(zip(rows, counts, strict=True)):
        first = start + place
        best = tuple(logprobs[first + 1 : first + 1 + count])
        found.append((row, TokenLogprobs(logprobs[first], tuple(tokens[start : start + count]), best)))
        start += count
    return found


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """Log-probabilities of a run of a prompt's tokens: what the model, at the token before, gave each of them."""

    start: int  # position of the first of them; the prompt's first token has none
    ranks: TokenArray  # u32 [num_tokens]: tokens of the vocabulary that are at least as likely, itself included
    top_tokens: TokenArray  # u32 [num_tokens, num_top]: best first
    logprobs: npt.NDArray[np.float32]  # [num_tokens, 1 + num_top]: the token's own, then the best tokens'

    @property
    def end(self) -> int:
        """Position behind the last of them."""
        return self.start + len(self.ranks)

    def part(self, start: int, end: int) -> PromptLogprobs:
        """Those of the tokens at positions `start` to `end` (exclusive)."""
        rows = slice(start - self.start, end - self.start)
        return PromptLogprobs(start, self.ranks[rows], self.top_tokens[rows], self.logprobs[rows])


def pack_prompt_logprobs(stream_id: int, found: PromptLogprobs) -> PromptLogprobColumns:
    return PromptLogprobColumns(
        stream_id, found.start, pack_tokens(found.ranks), pack_tokens(found.top_tokens),
        found.logprobs.astype("<f4", copy=False).tobytes(),
    )  # fmt: skip


def unpack_prompt_logprobs(columns: PromptLogprobColumns) -> PromptLogprobs:
    """Views of the columns. Raises `MalformedMessage` for columns that don't fit together."""
    sizes = (len(columns.ranks), len(columns.top_tokens), len(columns.logprobs))
    num_tokens, odd = divmod(sizes[0], 4)
    if odd or not num_tokens or sizes[1] % sizes[0] or sizes[1] > MAX_LOGPROBS * sizes[0] or sizes[2] != sum(sizes[:2]):
        raise MalformedMessage("columns of a prompt's log-probabilities that don't fit together")
    return PromptLogprobs(
        columns.start,
        np.frombuffer(columns.ranks, "<u4"),
        np.frombuffer(columns.top_tokens, "<u4").reshape(num_tokens, -1),
        np.frombuffer(columns.logprobs, "<f4").reshape(num_tokens, -1),
    )
