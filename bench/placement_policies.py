"""Policies that placement is compared with, given the same heartbeats, events and memory of their own placements."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import numpy as np

from bench.traces import TraceRequest
from kvferry_gateway.placement.decision import Placed, Request
from kvferry_gateway.placement.prediction import Snapshot
from kvferry_gateway.placement.routing import place

MODEL: Final = "m"
HIT_SHARE: Final = 0.5  # of the prompt: below it a cached prefix does not decide


class Choice:
    """Incarnations, and what a forecast was, for those that make one. `prefill` None: on decode."""

    __slots__ = ("decode", "itl_s", "prefill", "prefill_tokens", "ttft_s")

    def __init__(
        self, prefill: int | None, decode: int, prefill_tokens: int, ttft_s: float = 0.0, itl_s: float = 0.0
    ) -> None:
        self.prefill = prefill
        self.decode = decode
        self.prefill_tokens = prefill_tokens  # to be counted until the next heartbeat
        self.ttft_s = ttft_s
        self.itl_s = itl_s


class Policy(Protocol):
    def choose(self, request: TraceRequest, snapshot: Snapshot, seed: int, now: float) -> Choice: ...


class Ours:
    """`kvferry_gateway.placement.routing.place`."""

    def choose(self, request: TraceRequest, snapshot: Snapshot, seed: int, now: float) -> Choice:
        decision = place(
            Request(
                request.prompt_tokens,
                request.prompt_tokens + request.output_tokens,
                seed=seed,
                keys=request.keys,
            ),
            snapshot,
            now,
        )
        assert isinstance(decision, Placed), decision
        reason = decision.reason
        return Choice(
            None if decision.prefill is None else decision.prefill.incarnation,
            decision.decode.incarnation,
            request.prompt_tokens - reason.cached_tokens,
            reason.ttft_s,
            reason.itl_s,
        )


class RoundRobin:
    """Each worker of a role in its turn."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, request: TraceRequest, snapshot: Snapshot, seed: int, now: float) -> Choice:
        roster = snapshot.roster
        self._turn += 1
        prefills, decodes = roster.of_role("prefill"), roster.of_role("decode")
        return Choice(
            roster.incarnations[prefills[self._turn % len(prefills)]],
            roster.incarnations[decodes[self._turn % len(decodes)]],
            request.prompt_tokens,
        )


class LeastLoaded:
    """The prefill worker with the least seconds queued, the decode worker with the fewest streams."""

    def choose(self, request: TraceRequest, snapshot: Snapshot, seed: int, now: float) -> Choice:
        roster = snapshot.roster
        rows = roster.of_role("prefill")
        queue = roster.queue_seconds(rows, 0, now)
        return Choice(
            roster.incarnations[_lowest(queue, rows, seed)],
            _least_running(snapshot, seed),
            request.prompt_tokens,
        )


class CachedPrefix:
    """The prefill worker that has most of the prompt, if that is at least half of it; else the least loaded one.

    Without the threshold a system prompt that all requests share would send everything to the worker that was
    first to compute it.
    """

    def __init__(self) -> None:
        self._least_loaded = LeastLoaded()

    def choose(self, request: TraceRequest, snapshot: Snapshot, seed: int, now: float) -> Choice:
        roster = snapshot.roster
        rows = roster.of_role("prefill")
        depths = snapshot.index.depths(request.keys)[roster.slot[rows]]
        if not request.keys or depths.max() < HIT_SHARE * len(request.keys):
            return self._least_loaded.choose(request, snapshot, seed, now)
        return Choice(
            roster.incarnations[_lowest(-depths.astype(np.float64), rows, seed)],
            _least_running(snapshot, seed),
            request.prompt_tokens,
        )


def _least_running(snapshot: Snapshot, seed: int) -> int:
    roster = snapshot.roster
    rows = roster.of_role("decode")
    streams = roster.running[rows] + roster.waiting[rows] + roster.placed_requests[rows]
    return roster.incarnations[_lowest(streams, rows, seed)]


def _lowest(cost: np.ndarray, rows: np.ndarray, seed: int) -> int:
    """The row of the lowest cost; one of them by the seed, if there are several."""
    best = rows[cost == cost.min()]
    return int(best[seed % len(best)])


POLICIES: Final[Mapping[str, Callable[[], Policy]]] = {
    "ours": Ours,
    "round_robin": RoundRobin,
    "least_loaded": LeastLoaded,
    "cached_prefix": CachedPrefix,
}
