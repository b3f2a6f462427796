"""Where a request is on its way through the workers, and how far in that. Pure."""

from __future__ import annotations

from typing import Literal

from kvferry.wire.beats import SequenceState
from kvferry.wire.record import WorkerRecord
from kvferry_gateway.streams.attempt import Attempt

Phase = Literal["queued", "prefill", "kv", "decode"]


def phase_of(attempt: Attempt | None) -> Phase:
    """Where a request is, by what came from its workers: tokens at once, states with each heartbeat."""
    if attempt is None or not attempt.accepted:
        return "queued"
    on_decode = _state(attempt, attempt.decode)
    has_token = len(attempt.stream.tokens) > attempt.first_index
    if attempt.prefill is None:
        if has_token or on_decode == "running":
            return "decode"
        return "prefill" if on_decode == "computing" else "queued"
    if attempt.running:
        return "decode"
    on_prefill = _state(attempt, attempt.prefill)
    if has_token or on_prefill in ("held", "ended"):
        return "kv"
    return "prefill" if on_prefill == "computing" else "queued"


def progress_of(attempt: Attempt) -> tuple[int, int] | None:
    """(done, total): prompt tokens that are computed, or bytes of KV that have come. None: nobody has told."""
    phase = phase_of(attempt)
    if phase == "prefill":
        worker, state = attempt.scorer, "computing"
    elif phase == "kv":
        worker, state = attempt.decode, "fetching"
    else:
        return None
    row = attempt.rows.get(worker.incarnation)
    return (row.done, row.total) if row is not None and row.state == state and row.total else None


def _state(attempt: Attempt, worker: WorkerRecord) -> SequenceState | None:
    row = attempt.rows.get(worker.incarnation)
    return None if row is None else row.state
