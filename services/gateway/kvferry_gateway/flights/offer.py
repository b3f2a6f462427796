"""One offer of a request to a choice of workers: both are asked at the same moment, and both must accept."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from msgspec.structs import replace

from kvferry.log import get_logger
from kvferry.trace.open_span import OpenSpan
from kvferry.wire.fields import pack_tokens
from kvferry.wire.record import WorkerRecord
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry_gateway.errors import ApiError, context_length_exceeded, no_worker, numerics_gone, too_many_requests
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.fleet.mail import Reply, Unreachable
from kvferry_gateway.fleet.news import Order
from kvferry_gateway.placement.decision import Decision, Hopeless, Placed, Request
from kvferry_gateway.placement.pairing import NoWorker, OtherNumerics, TooLong
from kvferry_gateway.reasons import RefusalReason
from kvferry_gateway.streams.attempt import Attempt, Finished

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unit:
    """What is placed: fixed for the life of the request."""

    number: int
    request_id: str  # the client's label
    model: str
    prompt: bytes  # u32 column
    sampling: Sampling
    salt: bytes
    arrival: float  # Unix seconds: the ordering key
    prompt_field: str  # for errors
    priority: int = 0  # lower goes first
    choice: int = 0  # which output of its prompt: the draws' counter
    span: OpenSpan | None = None  # of the request; None: nobody records its trace

    @property
    def num_prompt(self) -> int:
        return len(self.prompt) // 4

    @property
    def order(self) -> Order:
        return self.priority, self.arrival, self.number


@dataclass(slots=True)
class Refusals:
    """What one round of placement has met."""

    full: dict[int, float]  # incarnation -> retry_after; those that are known to be full are not asked
    unusable: set[int] = field(default_factory=set)
    too_long: bool = False
    bus_down: bool = False
    passing: bool = False  # somebody was away who may be back in a moment

    def note(self, worker: WorkerRecord, reply: Reply) -> RefusalReason | None:
        """Remember an answer for this round. Why it is a refusal; None: it is none."""
        match reply:
            case Accepted():
                return None
            case Rejected(_, _, "queue_full", retry_after):
                self.full[worker.incarnation] = retry_after
                return "queue_full"
            case Rejected(_, _, reason):
                self.unusable.add(worker.incarnation)
                self.too_long |= reason == "too_long"
                self.passing |= reason in ("draining", "not_ready")
                return reason
            case Unreachable(bus_down, unsendable):
                self.unusable.add(worker.incarnation)
                self.bus_down |= bus_down
                self.passing |= not unsendable
                return "unreachable"

    def placement(self, decision: Decision, request: Request, unit: Unit) -> Placed:
        """What was decided, if it is to be tried. Raises the `ApiError` that the client gets else."""
        match decision:
            case Placed():
                return decision
            case Hopeless(expected_s, retry_after):
                raise too_many_requests(f"The first token is expected in {expected_s:.1f} s, too late.", retry_after)
            case TooLong(capacity) if not request.admitted:
                raise context_length_exceeded(
                    f"Prompt and output of {request.max_total} tokens fit no worker; the largest holds {capacity}.",
                    unit.prompt_field,
                )
            case OtherNumerics(numerics_id) if not (self.full or self.bus_down):
                raise numerics_gone(numerics_id)
            case TooLong() | NoWorker() | OtherNumerics():
                raise self.error(unit)

    def error(self, unit: Unit) -> ApiError:
        """What the client is told when nobody is left."""
        if self.full:
            return too_many_requests("All workers are busy; try again later.", min(self.full.values()))
        if self.too_long:
            return context_length_exceeded("Prompt and output fit no worker.", unit.prompt_field)
        if self.bus_down:
            return no_worker("The workers can't be reached at the moment.")
        return no_worker(f"No worker serves the model '{unit.model}' at the moment.")


def work_of(fleet: Fleet, attempt: Attempt, unit: Unit, seconds_left: float, *, alone: bool) -> Work:
    """What D is asked to do."""
    stream = attempt.stream
    work = Work(
        gateway=fleet.mail_from("decode"),
        gateway_incarnation=fleet.incarnation,
        ticket=attempt.ticket,
        attempt=attempt.number,
        stream_id=attempt.stream_id,
        choice=unit.choice,
        request_id=unit.request_id,
        model=unit.model,
        prompt=unit.prompt,
        generated=pack_tokens(stream.tokens),
        sampling=unit.sampling,
        priority=unit.priority,
        arrival=unit.arrival,
        salt=unit.salt,
        alone=alone,
        deadline=max(0.0, seconds_left),
        unit=unit.number,
        scoring=None if stream.scores is None else stream.scores.lacking,
        trace=None if attempt.span is None else attempt.span.context,
    )
    if attempt.scores_only:
        return replace(work, generated=b"", sampling=Sampling(max_tokens=0))
    return work


async def offer(
    fleet: Fleet, attempt: Attempt, work: Work, stop: asyncio.Future[Exception], refusals: Refusals
) -> None:
    """Sets `attempt.accepted`, or notes who refused and why. Returns early when `stop` is done.

    `work` is as D is to have it; P writes to another subject.
    """
    spawn = fleet.tasks.spawn
    decode = DecodeRequest(work, None if attempt.prefill is None else attempt.prefill.address)
    asked = {spawn(fleet.ask(attempt.decode, decode), "ask-decode"): attempt.decode}
    if attempt.prefill is not None:
        prefill = PrefillRequest(replace(work, gateway=fleet.mail_from("prefill")))
        asked[spawn(fleet.ask(attempt.prefill, prefill), "ask-prefill")] = attempt.prefill
    refused = False
    try:
        waiting: set[asyncio.Task[Reply]] = set(asked)
        while waiting and not refused:
            waits: tuple[asyncio.Future[Any], ...] = (*waiting, attempt.over, stop)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                return
            if attempt.over.done():
                # A first token that is also the last one may overtake the answers; all else refuses.
                attempt.accepted = isinstance(attempt.over.result(), Finished)
                return
            for task, worker in asked.items():
                if task in waiting and task.done():
                    waiting.discard(task)
                    if (reason := refusals.note(worker, task.result())) is not None:
                        refused = True
                        attempt.refusal = reason
                        fleet.metrics.refusals.labels(work.model, reason).inc()
                        log.info("refused", request_id=work.request_id, worker=worker.name, reason=reason)
        attempt.accepted = not refused
    finally:
        for task in asked:
            task.cancel()
