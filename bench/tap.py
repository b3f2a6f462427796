"""A listener on the control plane of a real stack: every placement of every request, and which tokens it gave.

HTTP carries text, and text names neither tokens nor workers. The bus does, so benchmarks and end-to-end tests
subscribe beside gateway and workers and change nothing. What a gateway holds is never guessed: each attempt carries it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kvferry.bus.base import Bus, BusMessage
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BusRole
from kvferry.errors import WireError
from kvferry.runfile import RunFile
from kvferry.runtime import SystemRuntime, blocking_clock
from kvferry.wire.beats import Heartbeat
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import ROOT
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest


class Inconsistent(Exception):
    """The bus said two things that cannot both be true, or left something out."""


@dataclass(slots=True)
class Attempt:
    """One placement. Times are of `blocking_clock`."""

    number: int
    ticket: bytes
    gateway: str  # bus subject of the one that placed it
    stream_id: int
    held: list[int]  # generated tokens that the gateway had when it placed
    workers: dict[str, int] = field(default_factory=dict)  # role -> incarnation
    answers: dict[str, float] = field(default_factory=dict)  # inbox -> when it was told Accepted
    tokens: dict[int, int] = field(default_factory=dict)  # generated index -> id
    contradictions: int = 0  # an index that was given two ids

    @property
    def accepted_at(self) -> float | None:
        """When the last of its workers had accepted. A worker that was asked twice makes it later, never earlier."""
        return max(self.answers.values()) if len(self.answers) >= len(self.workers) else None


@dataclass(slots=True)
class Heard:
    """One request of one choice."""

    prompt: list[int]
    sampling: Sampling
    choice: int
    attempts: dict[int, Attempt] = field(default_factory=dict)

    @property
    def last(self) -> Attempt:
        return self.attempts[max(self.attempts)]

    @property
    def generated(self) -> list[int]:
        """What the client was given: what the last attempt began with, and what it added.

        Raises `Inconsistent` if an index is missing or was given twice, or an attempt began with other tokens.
        """
        last = self.last
        first = len(last.held)
        if sorted(last.tokens) != list(range(first, first + len(last.tokens))):
            raise Inconsistent(f"attempt {last.number}: an index is missing")
        whole = last.held + [last.tokens[index] for index in sorted(last.tokens)]
        for attempt in self.attempts.values():
            if attempt.contradictions:
                raise Inconsistent(f"attempt {attempt.number}: {attempt.contradictions} times two ids for an index")
            if whole[: len(attempt.held)] != attempt.held:
                raise Inconsistent(f"attempt {attempt.number}: a token changed between two attempts")
        return whole

    def on(self, incarnation: int) -> bool:
        """Whether the last attempt needs this worker."""
        return incarnation in self.last.workers.values()


class Tap:
    """Requests by their x-request-id."""

    def __init__(self, bus: Bus, cluster: str) -> None:
        self.bus = bus
        self.cluster = cluster
        self.requests: dict[str, Heard] = {}
        self.beats: Counter[int] = Counter()  # heartbeats heard, by incarnation
        self._streams: dict[int, Attempt] = {}
        self._tickets: dict[tuple[bytes, int], Attempt] = {}
        self._codecs = Codecs()

    async def start(self) -> None:
        """Raises `BusUnavailable`."""
        # One subscription, so that an answer is never heard before its request.
        await self.bus.subscribe(f"{ROOT}.{self.cluster}.>", self._on_message)

    def changed(self) -> None:
        """Called after each message that was understood."""

    def _on_message(self, message: BusMessage) -> None:
        handlers = {
            "prefill": self._on_request, "decode": self._on_request, "gateway": self._on_tokens,
            "inbox": self._on_answer, "beat": self._on_beat,
        }  # fmt: skip
        handler = handlers.get(message.subject.split(".")[2])
        if handler is None:
            return  # nothing that a request or a worker's life is told by
        try:
            handler(message)
        except WireError:
            return  # a pong's, an echo's, or a test's own garbage
        self.changed()

    def _on_request(self, message: BusMessage) -> None:
        asked = self._codecs.to_worker.decode(message.payload)
        if not isinstance(asked, PrefillRequest | DecodeRequest):
            return
        work = asked.work
        heard = self.requests.setdefault(
            work.request_id, Heard(unpack_tokens(work.prompt).tolist(), work.sampling, work.choice)
        )
        attempt = heard.attempts.get(work.attempt)
        if attempt is None:
            attempt = Attempt(
                work.attempt, work.ticket, work.gateway, work.stream_id, unpack_tokens(work.generated).tolist()
            )
            heard.attempts[work.attempt] = attempt
            self._streams[work.stream_id] = attempt
            self._tickets[work.key] = attempt
            if isinstance(asked, DecodeRequest) and asked.prefill is not None:
                attempt.workers["prefill"] = asked.prefill.incarnation  # so that D alone is not taken for the pair
        _, _, role, _, incarnation, _ = message.subject.split(".")
        attempt.workers[role] = int(incarnation, 16)

    def _on_answer(self, message: BusMessage) -> None:
        answer = self._codecs.answer.decode(message.payload)
        if isinstance(answer, Accepted) and (attempt := self._tickets.get((answer.ticket, answer.attempt))):
            attempt.answers[message.subject] = blocking_clock()

    def _on_tokens(self, message: BusMessage) -> None:
        batch: TokenBatch = self._codecs.to_gateway.decode(message.payload)
        columns = (unpack_tokens(column).tolist() for column in (batch.stream_ids, batch.indices, batch.tokens))
        for stream_id, index, token in zip(*columns, strict=True):
            attempt = self._streams.get(stream_id)
            if attempt is not None and attempt.tokens.setdefault(index, token) != token:
                attempt.contradictions += 1

    def _on_beat(self, message: BusMessage) -> None:
        beat = self._codecs.beat.decode(message.payload)
        if isinstance(beat, Heartbeat):
            self.beats[beat.record.incarnation] += 1


@asynccontextmanager
async def bus_of(run_file: RunFile, role: BusRole = "observer") -> AsyncIterator[NatsBus]:
    """A connection with the rights of a role of the stack; an observer's hears everything."""
    bus = NatsBus(bus_login(run_file.in_role(role), role, f"kvferry-{role}"), SystemRuntime())
    await bus.start()
    try:
        yield bus
    finally:
        await bus.close()


@asynccontextmanager
async def tapped(run_file: RunFile) -> AsyncIterator[Tap]:
    """Listen while the block runs."""
    async with bus_of(run_file) as bus:
        tap = Tap(bus, run_file.cluster)
        await tap.start()
        yield tap
