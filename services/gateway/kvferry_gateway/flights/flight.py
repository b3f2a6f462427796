"""The life of one request on the workers: placed, asked, run, and placed again when a worker is lost.

    take_off: place -> ask both -> accepted             refused everywhere: 429, nobody there: 503
    land:     run -> Finished
                  -> Lost -> count it -> place again -> run …    failures used up, or no capacity for long: error

The gateway owns prompt and generated tokens, so every attempt goes on at exactly the next index.
"""

from __future__ import annotations

import asyncio
from typing import Any

from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry_gateway.answers.answer import FinishReason
from kvferry_gateway.errors import ApiError, ClientGone, deadline_exceeded, shutting_down
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.fleet.news import Waiting
from kvferry_gateway.flights.offer import Refusals, Unit, offer, work_of
from kvferry_gateway.flights.setbacks import Setbacks
from kvferry_gateway.placement.block_keys import BlockKeys
from kvferry_gateway.placement.decision import Request
from kvferry_gateway.placement.pairing import numerics_of
from kvferry_gateway.spans import begin_attempt, end_attempt
from kvferry_gateway.streams.attempt import Attempt, Finished, Lost, Verdict
from kvferry_gateway.streams.stream import TokenStream

log = get_logger(__name__)


class Flight:
    """One unit. `abandon` may be called at any time; `close` must be, in the end."""

    def __init__(self, fleet: Fleet, unit: Unit, stream: TokenStream, eos_token_ids: frozenset[int]) -> None:
        self.unit = unit
        self.stream = stream
        self._fleet = fleet
        self._timeline = fleet.timelines.begin(
            unit.number, unit.request_id, unit.model, unit.choice, unit.num_prompt, stream
        )
        self._settings = fleet.settings
        self._placer = fleet.placers[unit.model]
        self._eos_token_ids = eos_token_ids
        self._attempt: Attempt | None = None
        self._setbacks = Setbacks(self._settings.failure_budget, self._settings.request_deadline)
        self._finish_reason: FinishReason | None = None
        self._begun = False  # a worker has accepted, or given a token
        self._bound_to: str | None = None  # numerics_id that the unit began on, in `exact`
        self._block_keys = BlockKeys(unit.prompt, unit.salt)
        loop = asyncio.get_running_loop()
        # Done when nobody wants the rest: with the error to end with.
        self._stop: asyncio.Future[Exception] = loop.create_future()
        self._deadline = loop.time() + self._settings.request_deadline
        self._timer = loop.call_at(self._deadline, self._end_with, deadline_exceeded(self._settings.request_deadline))

    # -- from outside ----------------------------------------------------------------------------------------

    def abandon(self) -> None:
        """The client is gone. Workers are told in this turn of the loop."""
        self._end_with(ClientGone("the client closed its connection"))

    def shut_down(self) -> None:
        """The gateway stops and waits no longer."""
        self._end_with(shutting_down())

    def close(self) -> None:
        """Nothing of it is left on any worker, in any table, or on the loop's clock."""
        self._timer.cancel()
        self._retire(cancel=True)
        self._fleet.timelines.end(self._timeline, self._outcome())
        if not self._stop.done():
            self._stop.cancel()

    def _end_with(self, error: Exception) -> None:
        if not self._stop.done():
            self._stop.set_result(error)
        self._retire(cancel=True)

    def _outcome(self) -> str:
        """For its timeline."""
        if self._finish_reason is not None:
            return self._finish_reason
        if not self._stop.done() or self._stop.cancelled():
            return "refused" if not self._begun else "failed"
        error = self._stop.result()
        return "client gone" if isinstance(error, ClientGone) else "cut off"

    # -- the life --------------------------------------------------------------------------------------------

    async def take_off(self) -> None:
        """Place for the first time. Returns once the workers have accepted. Raises `ApiError`, `ClientGone`."""
        await self._place(first=True)

    async def follow(self) -> None:
        """Place as a part of a request that has begun: waits for capacity. Raises `ApiError`, `ClientGone`."""
        await self._place_in_time()

    async def land(self) -> FinishReason:
        """Until the choice is complete. Raises `ApiError`, `ClientGone`."""
        while (attempt := self._attempt) is not None:
            verdict = await self._verdict(attempt)
            if isinstance(verdict, Finished):
                told = self._ended() if attempt.scores_only else None
                self._finish_reason = told or verdict.reason
                self._finish()
            else:
                self._lose(verdict)
                await self._place_in_time()
        self._check_stop()
        reason = self._finish_reason = self._finish_reason or self._complete()
        assert reason is not None, "a flight that has no attempt is stopped or complete"
        return reason

    async def _verdict(self, attempt: Attempt) -> Verdict:
        waits: tuple[asyncio.Future[Any], ...] = (attempt.over, self._stop)
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._check_stop()
        return attempt.over.result()

    def _check_stop(self) -> None:
        if self._stop.done():
            raise self._stop.result()

    def _finish(self) -> None:
        """Cancel who doesn't know yet: D after a stop string, P or D where the other one ended it."""
        attempt = self._attempt
        assert attempt is not None
        self._fleet.confirm_end(attempt)
        attempt.forecast.ended(len(self.stream.tokens) - attempt.first_index, self.stream.last_token_at)
        self._retire(cancel=False)
        for worker in attempt.workers:
            ended_here = attempt.end is not None and worker.incarnation == attempt.end_from
            has_acknowledged = worker is attempt.prefill and attempt.running
            if not ended_here and not has_acknowledged:
                self._fleet.mail.cancel(worker, attempt)

    def _lose(self, verdict: Lost) -> None:
        """Count a lost attempt. Raises `ApiError` when that was the last one."""
        attempt = self._attempt
        assert attempt is not None
        self._fleet.metrics.replacements.labels(self.unit.model, verdict.reason).inc()
        self._timeline.lost(verdict.reason)
        log.info(
            "attempt lost", request_id=self.unit.request_id, attempt=attempt.number, reason=verdict.reason,
            num_tokens=len(self.stream.tokens),
        )  # fmt: skip
        self._retire(cancel=True)
        prefill = attempt.prefill
        if verdict.reason == "prefill_lost" and prefill is not None:
            self._fleet.suspect(prefill)
        self._setbacks.count(verdict, None if prefill is None else prefill.incarnation)

    def _ended(self) -> FinishReason | None:
        """Why nothing is left to generate, told by the tokens: the word that the last one was the last may have died
        with the worker."""
        tokens = self.stream.tokens
        if self.stream.stopped or (tokens and self.unit.sampling.is_end(tokens[-1], self._eos_token_ids)):
            return "stop"
        return "length" if len(tokens) >= self.stream.limit else None

    def _complete(self) -> FinishReason | None:
        """The same, where nothing else is asked for."""
        return None if self.stream.lacks_scores else self._ended()

    def _retire(self, *, cancel: bool) -> None:
        """The attempt's tokens are taken no more, and its workers need not go on."""
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        self._fleet.table.remove(attempt)
        if attempt.span is not None:
            end_attempt(attempt.span, attempt, now())
        if cancel:
            for worker in attempt.workers:
                self._fleet.mail.cancel(worker, attempt)

    # -- placement -------------------------------------------------------------------------------------------

    async def _place_in_time(self) -> None:
        """Place again; while there is no capacity, wait for it up to `replace_wait`."""
        since, waiting = now(), self._fleet.waiting
        try:
            while True:
                try:
                    return await self._place(first=False)
                except ApiError as error:
                    over = now() >= since + self._settings.replace_wait
                    if error.status not in (429, 503) or error.code == "worker_failed" or over:
                        raise
                    if self.unit.number not in waiting:
                        log.warning("no place to go on", request_id=self.unit.request_id, why=error.message)
                    waiting[self.unit.number] = Waiting(self.unit.request_id, self.unit.model, since, error.message)
                await self._fleet.news.wait(self.unit.order, self._stop)
                self._check_stop()
        finally:
            if waiting.pop(self.unit.number, None) is not None and self.unit.span is not None:
                self.unit.span.child("wait for workers", since).end(now())

    async def _place(self, *, first: bool) -> None:
        """Ask one choice of workers after the other, until one accepts. Raises `ApiError`, `ClientGone`."""
        # One that was admitted asks everybody: what it has begun is worth more than a question.
        refusals = Refusals(self._placer.full_for(self.unit.priority) if first else {})
        while self._complete() is None:
            keys = await self._keys()
            self._check_stop()
            attempt = self._begin(refusals, keys, first=first)
            work = work_of(self._fleet, attempt, self.unit, self._deadline - now(), alone=self._setbacks.alone)
            await offer(self._fleet, attempt, work, self._stop, refusals)
            for worker in attempt.workers:
                if (retry_after := refusals.full.get(worker.incarnation)) is not None:
                    self._placer.refused(worker.incarnation, self.unit.priority, retry_after)
            self._check_stop()
            if attempt.accepted:
                self._bind(attempt)
                kind = "local" if attempt.prefill is None else "pair"
                self._fleet.metrics.placements.labels(self.unit.model, kind).inc()
                self._timeline.accepted()
                if attempt.span is not None:
                    attempt.span.event("accepted", now())
                return
            if self.stream.tokens:
                self._bind(attempt)  # one worker took it and gave a token before the other one refused
            if attempt.over.done() and isinstance(lost := attempt.over.result(), Lost):
                self._lose(lost)
            self._retire(cancel=True)

    def _bind(self, attempt: Attempt) -> None:
        """The unit has begun: from here on its bits come from one numerics_id, if they are promised to."""
        if not self._begun:
            self._begun = True
            self._bound_to = numerics_of(attempt.decode)

    async def _keys(self) -> tuple[int, ...]:
        """Names of the text's blocks, as the workers' caches have them. A prompt that is scored is computed anew."""
        block_format = self._placer.block_format
        if block_format is None or self.stream.lacks_scores:
            return ()
        return await self._block_keys.of(block_format, self.stream.tokens)

    def _begin(self, refusals: Refusals, keys: tuple[int, ...], *, first: bool) -> Attempt:
        """Choose workers and give the attempt its numbers."""
        fleet, unit, moment = self._fleet, self.unit, now()
        ticket = fleet.runtime.random_bytes(16)
        unusable = refusals.unusable | self._setbacks.lost_prefills
        if unit.sampling.grammar is not None:
            unusable |= fleet.registry.without_grammars()
            if unit.sampling.grammar.kind == "tagged":
                unusable |= fleet.registry.without("tagged")
        if self.stream.lacks_scores:
            unusable |= fleet.registry.without("scoring")
        request = Request(
            num_tokens=unit.num_prompt + len(self.stream.tokens),
            max_total=unit.num_prompt + unit.sampling.max_tokens,
            seed=int.from_bytes(ticket[:8], "little"),
            keys=keys,
            priority=unit.priority,
            deadline_s=self._deadline - moment,
            local_prefill_threshold=self._placer.local_prefill_threshold,
            full=refusals.full.keys(),
            unusable=unusable,
            bound_to=self._bound_to,
            admitted=not first,
        )
        placed = refusals.placement(self._placer.place(request, moment), request, unit)
        number = fleet.new_attempt_number()
        attempt = Attempt(
            number=number,
            ticket=ticket,
            stream_id=fleet.table.new_stream_id(),
            stream=self.stream,
            decode=placed.decode,
            prefill=placed.prefill,
            first_index=len(self.stream.tokens),
            over=asyncio.get_running_loop().create_future(),
            forecast=self._placer.placed(request, placed, unit.request_id, number, moment),
        )
        if not self._begun:
            self.stream.placed(attempt.decode.numerics_id)
        attempt.scores_only = self._ended() is not None
        if unit.span is not None:
            attempt.span = begin_attempt(unit.span, attempt, unit.choice)
        fleet.table.add(attempt)
        self._attempt = attempt
        self._timeline.placed(attempt)
        self._log_placed(attempt)
        return attempt

    def _log_placed(self, attempt: Attempt) -> None:
        reason, prefill = attempt.forecast.reason, attempt.prefill
        log.info(
            "placed", request_id=self.unit.request_id, attempt=attempt.number, decode=attempt.decode.name,
            prefill=None if prefill is None else prefill.name, why=reason.why, cached_tokens=reason.cached_tokens,
            ttft_s=round(reason.ttft_s, 4), queue_s=round(reason.queue_s, 4), itl_s=round(reason.itl_s, 4),
            chance=round(reason.chance, 3), considered=reason.num_considered,
        )  # fmt: skip
