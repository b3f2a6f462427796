"""What would happen to a request on each worker: columns of seconds and chances, no choice. Pure.

prefill worker   queue ahead of it + its uncached tokens, at that worker's own rate
pair             + the part of the transfer that the prefill can't hide
decode worker    the step with one more sequence in it, and how many streams' ITL target that costs
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.schedule.chunk import STEP_TARGET_S
from kvferry_gateway.placement.estimates import FloatArray, ForecastError, LinkRates
from kvferry_gateway.placement.prefix_index import PrefixIndex
from kvferry_gateway.placement.roster import Mask, Roster, Rows
from kvferry_gateway.placement.targets import Targets

# Prefill goes on while pieces travel; what is left to send when it ends is about one chunk.
LAST_PIECE_TOKENS: Final = 256
TTFT_SIGMA: Final = 0.5  # of forecasts' logarithms, until they have been compared with what happened
ITL_SIGMA: Final = 0.2
NOMINAL_LINK_BYTES_PER_S: Final = 1e9


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a decision looks at: the workers of one model.

    It changes with heartbeats, events and outcomes, never by placing.
    """

    roster: Roster
    index: PrefixIndex
    links: LinkRates
    ttft_error: ForecastError
    itl_error: ForecastError
    targets: Targets

    @classmethod
    def empty(cls, targets: Targets) -> Snapshot:
        """Nobody known, nothing learned."""
        links = LinkRates(NOMINAL_LINK_BYTES_PER_S)
        return cls(Roster(), PrefixIndex(), links, ForecastError(TTFT_SIGMA), ForecastError(ITL_SIGMA), targets)


@dataclass(frozen=True, slots=True)
class Prefills:
    """Computing this prompt on each of `rows`; all arrays [rows]."""

    rows: Rows
    cached_tokens: FloatArray
    queue_s: FloatArray
    compute_s: FloatArray


@dataclass(frozen=True, slots=True)
class Decodes:
    """Decoding on each of `rows`; all arrays [rows]."""

    rows: Rows
    missing_bytes: FloatArray  # KV that the worker's own cache lacks
    itl_s: FloatArray
    harm: FloatArray  # streams, this one included, that are expected to miss their ITL target because of it
    lacks_blocks: Mask


class Prediction:
    """One request's view of a snapshot."""

    def __init__(self, snapshot: Snapshot, keys: tuple[int, ...], num_tokens: int, priority: int, now: float) -> None:
        self._snapshot = snapshot
        self._priority = priority
        self._num_tokens = num_tokens
        self._now = now
        self._depths = snapshot.index.depths(keys)  # [num_slots]

    def cached_tokens(self, rows: Rows) -> FloatArray:
        """Of the prompt, never all: the last token is always computed, for its logits."""
        roster = self._snapshot.roster
        blocks = self._depths[roster.slot[rows]] if len(self._depths) else np.zeros(len(rows))
        return np.minimum(blocks * roster.block_size[rows], self._num_tokens - 1).astype(np.float64)

    def prefills(self, rows: Rows) -> Prefills:
        roster = self._snapshot.roster
        queue_s = roster.queue_seconds(rows, self._priority, self._now)
        cached = self.cached_tokens(rows)
        return Prefills(rows, cached, queue_s, (self._num_tokens - cached) / roster.rate[rows])

    def decodes(self, rows: Rows, stall_s: FloatArray | float = 0.0) -> Decodes:
        """`stall_s`: a piece of this prompt's own prefill in the step."""
        snapshot = self._snapshot
        roster, target = snapshot.roster, snapshot.targets.itl_s
        base, slope = roster.step_base[rows], roster.step_slope[rows]
        others = roster.running[rows] + roster.waiting[rows] + roster.placed_requests[rows]
        # Prompts that are prefilled there already stretch its steps, too.
        chunk_s = np.minimum(roster.queued_tokens[rows, -1] / roster.rate[rows], STEP_TARGET_S)
        before_s = base + slope * np.maximum(others, 1.0) + chunk_s
        after_s = base + slope * (others + 1.0) + np.maximum(chunk_s, stall_s)
        before = snapshot.itl_error.chance(before_s, target)
        after = snapshot.itl_error.chance(after_s, target)
        missing = self._num_tokens - self.cached_tokens(rows)
        blocks = np.ceil((self._num_tokens + 1) / roster.block_size[rows]) + roster.placed_blocks[rows]
        return Decodes(
            rows,
            missing * roster.token_bytes[rows],
            after_s,
            (1.0 - after) + others * np.maximum(before - after, 0.0),
            blocks > roster.free_blocks[rows],
        )

    def transfer_s(self, prefills: Prefills, decodes: Decodes) -> FloatArray:
        """Seconds between the end of the prefill and the last byte's arrival, [prefills, decodes]."""
        snapshot = self._snapshot
        incarnations = snapshot.roster.incarnations
        rates = snapshot.links.matrix(
            [incarnations[row] for row in prefills.rows.tolist()], [incarnations[row] for row in decodes.rows.tolist()]
        )
        last = np.minimum(decodes.missing_bytes, LAST_PIECE_TOKENS * snapshot.roster.token_bytes[decodes.rows])
        hidden = decodes.missing_bytes / rates - prefills.compute_s[:, None]
        exposed: FloatArray = np.maximum(hidden, last / rates)
        return exposed
