"""One placement of one request: which workers, under which numbers, and how it ended."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from kvferry.trace.open_span import OpenSpan
from kvferry.wire.beats import Held
from kvferry.wire.record import WorkerRecord
from kvferry.wire.tokens import End, EndReason, Spent
from kvferry_gateway.answers.answer import FinishReason
from kvferry_gateway.placement.forecast import Forecast
from kvferry_gateway.reasons import LostReason
from kvferry_gateway.streams.stream import TokenStream

MAX_REMEMBERED: Final = 4096  # attempts that are over, kept to cancel them where they live on
# A heartbeat may have been built just before the worker accepted the request.
MISSING_BEATS: Final = 2

# Ends that are nobody's fault: the rest of the request is placed anew and no failure is counted.
HARMLESS_ENDS: Final[frozenset[EndReason]] = frozenset({"preempted", "draining", "expired"})


@dataclass(frozen=True, slots=True)
class Finished:
    """The choice is complete."""

    reason: FinishReason


@dataclass(frozen=True, slots=True)
class Lost:
    """The attempt is over and the choice is not complete."""

    reason: LostReason
    crashed: bool = False  # a worker of it ended by itself, as far as its supervisor knows
    detail: str = ""  # for the client

    @property
    def is_failure(self) -> bool:
        return self.reason not in HARMLESS_ENDS


Verdict = Finished | Lost


@dataclass(eq=False, slots=True)
class Attempt:
    """`over` is done once, with the verdict; the first one counts."""

    number: int
    ticket: bytes
    stream_id: int
    stream: TokenStream
    decode: WorkerRecord
    prefill: WorkerRecord | None  # None: `decode` computes the prompt itself
    first_index: int  # of the tokens that this attempt is to generate
    over: asyncio.Future[Verdict]
    forecast: Forecast
    accepted: bool = False  # by D
    refusal: str | None = None  # why a worker did not take it
    span: OpenSpan | None = None  # None: nobody records its trace
    running_seen: bool = False
    end: End | None = None  # a final one, whose tokens are not all here yet
    end_from: int = 0  # incarnation that sent it
    scores_only: bool = False  # nothing is left to generate
    missing: int = 0  # heartbeats of D in a row that don't know it
    missing_scores: int = 0  # heartbeats of the worker that scores its prompt that don't know it
    promised_scores: int = 0  # position up to which that worker had scored it at its last heartbeat
    promised: dict[int, int] = field(default_factory=dict)  # incarnation -> next index in its last heartbeat
    rows: dict[int, Held] = field(default_factory=dict)  # incarnation -> as its last heartbeat had it
    spent: dict[int, tuple[float, Spent]] = field(default_factory=dict)  # incarnation -> what it told, and when

    @property
    def running(self) -> bool:
        """Whether P is needed no more. Only D sends indices after the first."""
        if self.prefill is None:
            return True
        started = self.running_seen or len(self.stream.tokens) > self.first_index + 1
        return started and not self.stream.lacks_scores

    @property
    def scorer(self) -> WorkerRecord:
        """Who computes the prompt."""
        return self.decode if self.prefill is None else self.prefill

    @property
    def workers(self) -> tuple[WorkerRecord, ...]:
        return (self.decode,) if self.prefill is None else (self.decode, self.prefill)

    def conclude(self, verdict: Verdict) -> None:
        if not self.over.done():
            self.over.set_result(verdict)

    def break_off(self) -> None:
        """What a worker says is not what it was asked for."""
        self.conclude(Lost("error"))

    def ended(self, end: End, incarnation: int) -> bool:
        """An End came. True: it may be acknowledged now."""
        if end.reason == "stop" or end.reason == "length":
            self.end, self.end_from = end, incarnation
            self.stream.is_ending = True
            return False  # once its tokens are here
        from_prefill = self.prefill is not None and incarnation == self.prefill.incarnation
        if not (from_prefill and self.running):
            self.conclude(Lost(end.reason, detail=end.detail))
        return True

    def review(self) -> None:
        """Tokens, an end or the last log-probabilities of the prompt have come: is the choice complete?"""
        if self.stream.lacks_scores:
            return
        if self.stream.stopped:
            self.conclude(Finished("stop"))
        elif self.end is not None and len(self.stream.tokens) >= min(self.end.index, self.stream.limit):
            # What a worker says beyond max_tokens is not taken, so its end may lie where no token comes.
            complete = len(self.stream.tokens) >= self.end.index
            self.conclude(Finished("stop" if complete and self.end.reason == "stop" else "length"))


_NONE: Final[Mapping[int, Attempt]] = {}
_NO_STREAMS: Final[Mapping[int, TokenStream]] = {}


class AttemptTable:
    """The attempts under way, by stream and by worker."""

    def __init__(self) -> None:
        self._live: set[int] = set()  # stream ids
        self._by_worker: dict[int, dict[int, Attempt]] = {}
        self._streams: dict[int, dict[int, TokenStream]] = {}  # the same ones'
        self._remembered: OrderedDict[int, tuple[bytes, int]] = OrderedDict()
        self._last_stream_id = 0

    def __len__(self) -> int:
        return len(self._live)

    def new_stream_id(self) -> int:
        """A u32 that no live or remembered attempt has."""
        while True:
            self._last_stream_id = (self._last_stream_id + 1) & 0xFFFFFFFF
            if self._last_stream_id not in self._live and self._last_stream_id not in self._remembered:
                return self._last_stream_id

    def add(self, attempt: Attempt) -> None:
        self._live.add(attempt.stream_id)
        attempt.stream.join(attempt)
        for worker in attempt.workers:
            self._by_worker.setdefault(worker.incarnation, {})[attempt.stream_id] = attempt
            self._streams.setdefault(worker.incarnation, {})[attempt.stream_id] = attempt.stream

    def remove(self, attempt: Attempt) -> None:
        """From here on its tokens are nobody's. Without effect if that is so already."""
        if attempt.stream_id not in self._live:
            return
        self._live.remove(attempt.stream_id)
        attempt.stream.attempt = None
        attempt.stream.held.clear()
        for worker in attempt.workers:
            attempts, streams = self._by_worker[worker.incarnation], self._streams[worker.incarnation]
            del attempts[attempt.stream_id], streams[attempt.stream_id]
            if not attempts:
                del self._by_worker[worker.incarnation], self._streams[worker.incarnation]
        self._remembered[attempt.stream_id] = (attempt.ticket, attempt.number)
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)

    def of(self, incarnation: int) -> Mapping[int, Attempt]:
        """The attempts of one worker by stream id, as they are."""
        return self._by_worker.get(incarnation, _NONE)

    def streams_of(self, incarnation: int) -> Mapping[int, TokenStream]:
        """Their streams, by the same ids: the token path's own look-up."""
        return self._streams.get(incarnation, _NO_STREAMS)

    def of_worker(self, incarnation: int) -> list[Attempt]:
        return list(self.of(incarnation).values())

    def remembered(self, stream_id: int) -> tuple[bytes, int] | None:
        """(ticket, attempt) of an attempt that is over."""
        return self._remembered.get(stream_id)

    def live(self) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """(worker incarnation, its stream ids), for the gateway's heartbeat."""
        return tuple((incarnation, tuple(attempts)) for incarnation, attempts in self._by_worker.items())


@dataclass(frozen=True, slots=True)
class Audit:
    """What one worker's heartbeat shows about this gateway's attempts there."""

    resend: tuple[tuple[int, int], ...]  # (stream_id, next index) of tokens that never came
    resend_prompts: tuple[tuple[int, int], ...]  # (stream_id, position) of prompts' log-probabilities that never came
    forgotten: tuple[Attempt, ...]  # the worker should have them and doesn't
    strangers: tuple[Held, ...]  # the worker has them and shouldn't


def audit(incarnation: int, rows: Iterable[Held], attempts: Iterable[Attempt]) -> Audit:
    """Compare a heartbeat's rows with the attempts on that worker, and note in them what it showed."""
    resend: list[tuple[int, int]] = []
    resend_prompts: list[tuple[int, int]] = []
    forgotten: list[Attempt] = []
    unclaimed = {row.stream_id: row for row in rows}
    for attempt in attempts:
        row = unclaimed.pop(attempt.stream_id, None)
        on_decode = attempt.decode.incarnation == incarnation
        scores = attempt.stream.scores if attempt.scorer.incarnation == incarnation else None
        if row is None and scores is not None and attempt.stream.lacks_scores and attempt.accepted:
            # It keeps them until it is told that they have come.
            attempt.missing_scores += 1
            if attempt.missing_scores >= MISSING_BEATS:
                forgotten.append(attempt)
                continue
        if row is None:
            # P forgets a request when D has its KV; if that is too early, D finds out and says so.
            if on_decode and attempt.accepted:
                attempt.missing += 1
                if attempt.missing >= MISSING_BEATS:
                    forgotten.append(attempt)
            continue
        if scores is not None:
            attempt.missing_scores = 0
            if attempt.promised_scores > scores.next:
                resend_prompts.append((attempt.stream_id, scores.next))
            attempt.promised_scores = row.next_scored
        if on_decode:
            attempt.missing = 0
            attempt.running_seen |= row.state == "running"
        held = len(attempt.stream.tokens)
        if attempt.promised.get(incarnation, 0) > held:  # sent before the last heartbeat, and still not here
            resend.append((attempt.stream_id, held))
        attempt.promised[incarnation] = row.next_index
        attempt.rows[incarnation] = row
    return Audit(tuple(resend), tuple(resend_prompts), tuple(forgotten), tuple(unclaimed.values()))
