"""Whether a request may become a sequence on this worker at all. Pure."""

from __future__ import annotations

from kvferry.schedule.step import ModelRunner
from kvferry.wire.beats import WorkerState
from kvferry.wire.fields import Role, unpack_tokens
from kvferry.wire.work import DecodeRequest, PrefillRequest, RejectReason
from kvferry.worker.scheduler import Scheduler


def refuse(
    request: PrefillRequest | DecodeRequest, role: Role, state: WorkerState, model_name: str, runner: ModelRunner
) -> RejectReason | None:
    """Why a request is refused before anything is made of it, or None. Whether there is room is not asked here."""
    work = request.work
    if state != "ready":
        return "draining" if state == "draining" else "not_ready"
    if work.model != model_name:
        return "wrong_model"
    if isinstance(request, PrefillRequest) != (role == "prefill"):
        return "malformed"
    if len(work.prompt) % 4 or len(work.generated) % 4 or not work.prompt:
        return "malformed"
    if (len(work.prompt) + len(work.generated)) // 4 >= runner.max_model_len:
        return "too_long"
    if work.scoring is not None and work.scoring.start >= len(work.prompt) // 4:
        return "malformed"  # no such token
    if work.sampling.max_tokens == 0 and (work.scoring is None or work.generated):
        return "malformed"  # nothing is asked for
    if 0 < work.sampling.max_tokens <= len(work.generated) // 4:
        return "malformed"  # nothing is left to draw
    for column in (work.prompt, work.generated):
        if column and int(unpack_tokens(column).max()) >= runner.vocab_size:
            return "malformed"
    return None


def retry_after(scheduler: Scheduler) -> float:
    """Seconds until what waits now could have been computed, at this worker's own rate; 1 to 30."""
    rate = scheduler.chunk.tokens_per_s
    return min(30.0, max(1.0, sum(scheduler.queued_tokens) / rate)) if rate else 1.0
