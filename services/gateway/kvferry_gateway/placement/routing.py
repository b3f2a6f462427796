"""Where a request goes. Pure: `place(request, snapshot, now) -> decision`.

1. Who may: state, capacity, refusals so far, the numerics that the unit is bound to.
2. For every one of them a cost (`comparison`). The cheapest of each role, at most 16, are the shortlists.
3. Every allowed pair of the two shortlists with its own link's rate, and every decode worker that could prefill
   the prompt itself without hurting its streams. The cheapest is taken; what is about equal, by the ticket.

Work costs more than its own seconds: everyone queued behind waits for it too, so a second of computing is
charged once more for each request that waits, on average, at a prefill worker. That is what makes a cached
prefix worth a longer queue when it is busy, and hardly when it is idle.

A snapshot is of one model's workers. They pair by the rule of `placement.Partners`: one KV format, and one numerics_id
if the decode worker is exact.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvferry_gateway.placement.comparison import Comparison
from kvferry_gateway.placement.decision import Decision, Request
from kvferry_gateway.placement.pairing import NoWorker, OtherNumerics, TooLong
from kvferry_gateway.placement.prediction import Snapshot
from kvferry_gateway.placement.roster import Mask, Roster, Rows
from kvferry_gateway.placement.shortlist import SHORTLIST


def place(request: Request, snapshot: Snapshot, now: float, width: int = SHORTLIST) -> Decision:
    """Decide. `NoWorker` with some in `request.full` means that all are full. `width`: of each shortlist."""
    roster = snapshot.roster
    decoders = _serving(roster, "decode", request)
    if request.bound_to is not None and len(decoders):
        numerics = roster.id_of("numerics", request.bound_to)
        decoders = decoders[roster.exact[decoders] & (roster.numerics[decoders] == numerics)]
        if not len(decoders):
            return OtherNumerics(request.bound_to)
    if len(decoders) and (largest := int(roster.capacity[decoders].max())) < request.max_total:
        return TooLong(largest)
    full = roster.rows_of(request.full)
    decoders = _without(decoders[roster.capacity[decoders] >= request.max_total], full)
    if not len(decoders):
        return NoWorker()
    prefillers = _serving(roster, "prefill", request)
    prefillers = prefillers[roster.capacity[prefillers] >= request.num_tokens]
    able = _without(prefillers, full)
    comparison = Comparison(request, snapshot, now, width, able)
    if request.num_tokens < request.local_prefill_threshold:
        comparison.local(decoders, "short_prompt")
        return comparison.decision()
    unpaired = []
    for group in _groups(roster, decoders):
        if len(mates := able[_pairs_with(roster, able, group)]):
            comparison.pairs(mates, group)
        elif not _pairs_with(roster, prefillers, group).any():
            unpaired.append(group)
    if comparison.found and snapshot.targets.prefill_on_decode:
        comparison.local(comparison.harmless(decoders), "faster_on_decode")
    elif not comparison.found and unpaired:
        # The prefill workers are full, or there are none. Decode must not take a full one's load on top: only
        # a decode worker that no prefill worker may serve computes prompts itself.
        comparison.local(np.concatenate(unpaired), "no_prefill_worker")
    return comparison.decision()


def _serving(roster: Roster, role: str, request: Request) -> Rows:
    rows = roster.of_role(role)
    return _without(rows[roster.ready[rows]], roster.rows_of(request.unusable))


def _without(rows: Rows, excluded: list[int]) -> Rows:
    return rows[~np.isin(rows, excluded)] if excluded else rows


def _groups(roster: Roster, decoders: Rows) -> Iterator[Rows]:
    """Decode workers that take the same prefill workers' KV. As a rule there is one group."""
    numerics = np.where(roster.exact[decoders], roster.numerics[decoders], -1)
    groups = roster.kv_format[decoders] * (1 << 32) + numerics
    if (groups == groups[0]).all():
        yield decoders
        return
    for group in np.unique(groups):
        yield decoders[groups == group]


def _pairs_with(roster: Roster, prefillers: Rows, decoders: Rows) -> Mask:
    """Which prefill workers may serve these decode workers, which are of one group."""
    one = decoders[0]
    mates: Mask = roster.kv_format[prefillers] == roster.kv_format[one]
    if roster.exact[one]:
        mates &= roster.exact[prefillers] & (roster.numerics[prefillers] == roster.numerics[one])
    return mates
