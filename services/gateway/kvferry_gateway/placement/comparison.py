"""Costs of the workers and pairs that a request may go to, and the cheapest of them. Pure.

A cost is in units of targets, so that TTFT and ITL add up: expected TTFT / its target + chance to miss it
+ streams expected to miss their ITL target for it, plus small weights that order what meets every target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.schedule.chunk import STEP_TARGET_S
from kvferry_gateway.placement.decision import Decision, Hopeless, Placed, Reason, Request, Why
from kvferry_gateway.placement.estimates import FloatArray
from kvferry_gateway.placement.pairing import NoWorker
from kvferry_gateway.placement.prediction import Decodes, Prediction, Prefills, Snapshot
from kvferry_gateway.placement.roster import Rows
from kvferry_gateway.placement.shortlist import blurs, lowest

SAFE_CHANCE: Final = 0.9  # of keeping the ITL target while a decode worker prefills
DEADLINE_CHANCE: Final = 0.05  # of making it, below which a request is refused at once
MAX_EXTERNALITY: Final = 4.0  # queued requests that a second of work is charged for
ITL_WEIGHT: Final = 0.1  # of a step that keeps its target: shorter is better, but TTFT counts for more
TRANSFER_WEIGHT: Final = 0.1  # of bytes that hide behind the prefill and still take the link
NO_BLOCKS: Final = 10.0  # a decode worker without blocks comes after all that have them


@dataclass(frozen=True, slots=True)
class _Best:
    order: float  # the cost, blurred: what decides
    cost: float
    prefill: int | None  # row
    decode: int
    why: Why
    ttft_s: float
    queue_s: float
    compute_s: float
    transfer_s: float
    itl_s: float
    chance: float
    cached_tokens: float


class Comparison:
    """Keeps the best choice so far. One for each decision."""

    def __init__(self, request: Request, snapshot: Snapshot, now: float, width: int, prefillers: Rows) -> None:
        roster = snapshot.roster
        self._request = request
        self._snapshot = snapshot
        self._width = width
        self._predict = Prediction(snapshot, request.keys, request.num_tokens, request.priority, now)
        queued = roster.waiting[prefillers] + roster.placed_requests[prefillers]
        self._externality = min(MAX_EXTERNALITY, float(queued.mean())) if len(prefillers) else 0.0
        self._best: _Best | None = None
        self._lowest_cost = math.inf
        self._num_considered = 0

    @property
    def found(self) -> bool:
        return self._best is not None

    def pairs(self, prefillers: Rows, decoders: Rows) -> None:
        """Compare all pairs of the two shortlists."""
        predict, seed, width = self._predict, self._request.seed, self._width
        prefills, decodes = predict.prefills(prefillers), predict.decodes(decoders)
        bare = self._prefill_cost(prefills, prefills.queue_s + prefills.compute_s)
        decode_costs = self._decode_cost(decodes)
        # Each worker is blurred once, so that a decision does not depend on the shortlists' width.
        blur, decode_blur = blurs(bare, prefillers, seed), blurs(decode_costs, decoders, seed)
        p, d = lowest(bare + blur, width), lowest(decode_costs + decode_blur, width)
        least_queued = int(prefills.rows[np.argmin(prefills.queue_s)])
        prefills, decodes = _rows_of_prefills(prefills, p), _rows_of_decodes(decodes, d)
        transfer = predict.transfer_s(prefills, decodes)
        ttft = (prefills.queue_s + prefills.compute_s)[:, None] + transfer  # [prefills, decodes]
        exact = self._prefill_cost(prefills, ttft) + decode_costs[d]
        order = exact + blur[p, None] + decode_blur[d]
        i, j = np.unravel_index(int(np.argmin(order)), order.shape)
        self._num_considered += order.size
        self._lowest_cost = min(self._lowest_cost, float(exact.min()))
        row = int(prefills.rows[i])
        cached = float(prefills.cached_tokens[i])
        self._take(
            _Best(
                float(order[i, j]), float(exact[i, j]), row, int(decodes.rows[j]),
                "cached_prefix" if cached and row != least_queued else "least_work",
                float(ttft[i, j]), float(prefills.queue_s[i]), float(prefills.compute_s[i]), float(transfer[i, j]),
                float(decodes.itl_s[j]), self._chance(float(ttft[i, j]), float(decodes.itl_s[j])), cached,
            )
        )  # fmt: skip

    def local(self, decoders: Rows, why: Why) -> None:
        """Compare prefilling on each of these decode workers."""
        if not len(decoders):
            return
        predict = self._predict
        prefills = predict.prefills(decoders)
        decodes = predict.decodes(decoders, np.minimum(prefills.compute_s, STEP_TARGET_S))
        ttft = prefills.queue_s + prefills.compute_s
        costs = self._prefill_cost(prefills, ttft) + self._decode_cost(decodes, local=True)
        order = costs + blurs(costs, decoders, self._request.seed)
        i = int(np.argmin(order))
        self._num_considered += len(order)
        self._lowest_cost = min(self._lowest_cost, float(costs.min()))
        self._take(
            _Best(
                float(order[i]), float(costs[i]), None, int(decoders[i]), why, float(ttft[i]),
                float(prefills.queue_s[i]), float(prefills.compute_s[i]), 0.0, float(decodes.itl_s[i]),
                self._chance(float(ttft[i]), float(decodes.itl_s[i])), float(prefills.cached_tokens[i]),
            )
        )  # fmt: skip

    def harmless(self, decoders: Rows) -> Rows:
        """Those that could prefill this prompt and keep the ITL target of their streams, and of those to come.

        Beside running streams each piece of it must fit into a step. An idle worker may take what ends within
        one step, for which a newcomer would wait at most.
        """
        snapshot, predict = self._snapshot, self._predict
        roster = snapshot.roster
        work = predict.prefills(decoders).compute_s
        short = work <= STEP_TARGET_S  # what is longer fits beside streams still less
        decoders, work = decoders[short], work[short]
        if not len(decoders):
            return decoders
        itl = predict.decodes(decoders, work).itl_s
        safe = snapshot.itl_error.chance(itl, snapshot.targets.itl_s) >= SAFE_CHANCE
        idle = roster.running[decoders] + roster.waiting[decoders] + roster.placed_requests[decoders] == 0
        harmless: Rows = decoders[safe | idle]
        return harmless

    def decision(self) -> Decision:
        """The cheapest, unless it would come too late."""
        best, request, snapshot = self._best, self._request, self._snapshot
        if best is None:
            return NoWorker()
        targets, errors = snapshot.targets, snapshot.ttft_error
        late = request.deadline_s <= 0 or (
            float(errors.chance(np.asarray(best.ttft_s), request.deadline_s)) < DEADLINE_CHANCE
        )
        if not request.admitted and (late or best.queue_s > targets.max_queue_of(request.priority)):
            return Hopeless(best.ttft_s, max(1.0, best.queue_s - targets.ttft_s))
        records = snapshot.roster.records
        decode = records[best.decode]
        assert decode is not None, "a row that is free was chosen"
        reason = Reason(
            best.why, best.ttft_s, best.queue_s, best.compute_s, best.transfer_s, best.itl_s, best.chance,
            int(best.cached_tokens), self._num_considered,
        )  # fmt: skip
        return Placed(
            None if best.prefill is None else records[best.prefill], decode, best.cost, self._lowest_cost, reason
        )

    def _take(self, choice: _Best) -> None:
        if self._best is None or choice.order < self._best.order:
            self._best = choice

    def _prefill_cost(self, prefills: Prefills, ttft: FloatArray) -> FloatArray:
        target = self._snapshot.targets.ttft_s
        others = self._externality * prefills.compute_s / target
        if ttft.ndim == 2:
            others = others[:, None]
        return np.asarray(ttft / target + others + 1.0 - self._snapshot.ttft_error.chance(ttft, target))

    def _decode_cost(self, decodes: Decodes, local: bool = False) -> FloatArray:
        targets = self._snapshot.targets
        cost = decodes.harm + ITL_WEIGHT * decodes.itl_s / targets.itl_s + NO_BLOCKS * decodes.lacks_blocks
        if not local:
            cost = cost + TRANSFER_WEIGHT * decodes.missing_bytes / self._snapshot.links.average / targets.ttft_s
        return np.asarray(cost)

    def _chance(self, ttft_s: float, itl_s: float) -> float:
        snapshot = self._snapshot
        ttft = snapshot.ttft_error.chance(np.asarray(ttft_s), snapshot.targets.ttft_s)
        return float(ttft * snapshot.itl_error.chance(np.asarray(itl_s), snapshot.targets.itl_s))


def _rows_of_prefills(prefills: Prefills, at: Rows) -> Prefills:
    return Prefills(prefills.rows[at], prefills.cached_tokens[at], prefills.queue_s[at], prefills.compute_s[at])


def _rows_of_decodes(decodes: Decodes, at: Rows) -> Decodes:
    return Decodes(
        decodes.rows[at], decodes.missing_bytes[at], decodes.itl_s[at], decodes.harm[at], decodes.lacks_blocks[at]
    )
