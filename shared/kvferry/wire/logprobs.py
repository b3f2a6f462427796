"""Log-probabilities beside tokens, and their columns (`LogprobColumns`) on both planes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvferry.errors import MalformedMessage
from kvferry.wire.messages import MAX_LOGPROBS, LogprobColumns, pack_tokens


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
