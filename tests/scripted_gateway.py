"""A gateway that speaks the bus protocol by hand, so that a test decides every message."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from kvferry.bus.base import BusMessage
from kvferry.errors import BusUnavailable
from kvferry.runtime import TaskSet, now
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.fields import pack_tokens, unpack_tokens
from kvferry.wire.logprobs import TokenLogprobs, unpack_logprobs
from kvferry.wire.messages import Codecs, ToWorker
from kvferry.wire.orders import Cancel, EndAck, Resend
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import beat_subject, mail_subject, process_subject
from kvferry.wire.tokens import End, Spent, TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry.worker.report import address
from kvferry.worker.worker import Worker
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.worker import PrefillWorker

if TYPE_CHECKING:
    from cluster import Cluster

ACCEPT_S = 0.3  # as gateways wait for the answer to a placement


class ScriptedGateway:
    """Speaks the gateway's side of the bus, one message at a time."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.incarnation = cluster.runtime.random_u64()
        self.subject = mail_subject(process_subject("dev", "gateway", name, self.incarnation), "decode")
        self.tokens: dict[int, dict[int, int]] = {}  # stream_id -> index -> token
        self.logprobs: dict[int, dict[int, TokenLogprobs]] = {}  # the same
        self.ends: dict[int, End] = {}
        self.cached: dict[int, int] = {}
        self.spent: dict[tuple[int, int], Spent] = {}  # by incarnation and stream
        self.beating = True
        self.acks = True
        self.lose = 0  # batches that still get lost on the way
        self.num_ends = 0  # ends heard, repeats among them
        self.next_seq: dict[int, int] = {}  # worker incarnation -> batch_seq that follows
        self._name = name
        self._cluster = cluster
        self._bus = cluster.bus(name, "gateway")
        self._codecs = Codecs()
        self._changed = asyncio.Event()
        self._failures: list[BaseException] = []
        self._tasks = TaskSet(lambda _, error: self._failures.append(error))
        self._attempt = 0
        self._live: dict[int, set[int]] = {}

    async def start(self) -> None:
        await self._bus.start()
        await self._bus.subscribe(self.subject, self._on_batch)
        self._tasks.spawn(self._beat(), "beat")

    async def stop(self) -> None:
        await self._tasks.cancel()
        await self._bus.close()
        assert not self._failures, self._failures

    def work(self, prompt: list[int], generated: list[int] | None = None, **fields: Any) -> Work:
        self._attempt += 1
        sampling = fields.pop("sampling", Sampling(temperature=0.0, max_tokens=8))
        made: dict[str, Any] = {
            "gateway": self.subject,
            "gateway_incarnation": self.incarnation,
            "ticket": self._cluster.runtime.random_bytes(16),
            "attempt": self._attempt,
            "stream_id": self._attempt,
            "choice": 0,
            "request_id": f"r{self._attempt}",
            "model": "memory",
            "prompt": pack_tokens(prompt),
            "generated": pack_tokens(generated or []),
            "sampling": sampling,
            "priority": 0,
            "arrival": now() + self._attempt * 1e-6,  # no two at one virtual instant
            "salt": b"",
            "unit": self._attempt,
            **fields,
        }
        return Work(**made)

    async def place(self, work: Work, decode: DecodeWorker, prefill: PrefillWorker | None) -> list[Accepted | Rejected]:
        """Ask both workers at the same moment, as a gateway does."""
        source = None
        asked: list[Awaitable[Accepted | Rejected]] = []
        if prefill is not None:
            source = address(prefill)
            asked.append(self.ask(prefill, PrefillRequest(work)))
            self.expect(work, prefill)
        asked.append(self.ask(decode, DecodeRequest(work, source)))
        self.expect(work, decode)
        return list(await asyncio.gather(*asked))

    async def accepted(self, work: Work, decode: DecodeWorker, prefill: PrefillWorker | None) -> None:
        """Place a work that both must accept."""
        answers = await self.place(work, decode, prefill)
        assert all(isinstance(answer, Accepted) for answer in answers), answers

    async def run(self, prompt: list[int], decode: DecodeWorker, prefill: PrefillWorker | None, **fields: Any) -> Work:
        """Place a work and wait for its end."""
        work = self.work(prompt, **fields)
        await self.accepted(work, decode, prefill)
        await self.ended(work)
        return work

    def again(self, work: Work, **fields: Any) -> Work:
        """The next attempt at the same unit, with the tokens that have come."""
        generated = unpack_tokens(work.generated).tolist() + self.text(work)
        prompt = unpack_tokens(work.prompt).tolist()
        made = {"unit": work.unit, "arrival": work.arrival, "sampling": work.sampling, **fields}
        return self.work(prompt, generated, **made)

    def expect(self, work: Work, worker: Worker[Any]) -> None:
        """Name a stream in the heartbeats as one that this worker shall serve."""
        self._live.setdefault(worker.incarnation, set()).add(work.stream_id)

    async def ask(self, worker: Worker[Any], message: ToWorker, limit: float = ACCEPT_S) -> Any:
        answer = await self._bus.request(worker.subject, self._codecs.to_worker.encode(message), limit)
        return self._codecs.answer.decode(answer)

    async def tell(self, worker: Worker[Any], message: ToWorker) -> None:
        await self._bus.publish(worker.subject, self._codecs.to_worker.encode(message))

    async def cancel(self, work: Work, *workers: Worker[Any]) -> None:
        for worker in workers:
            await self.tell(worker, Cancel(work.ticket, work.attempt))

    async def until(self, condition: Callable[[], bool], limit: float = 60.0) -> None:
        """Wait until something that arrives makes the condition true."""
        async with asyncio.timeout(limit):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def ended(self, work: Work, limit: float = 60.0) -> End:
        await self.until(lambda: work.stream_id in self.ends, limit)
        return self.ends[work.stream_id]

    def text(self, work: Work) -> list[int]:
        """Tokens of a stream, in order, from the first index of its attempt."""
        rows = self.tokens.get(work.stream_id, {})
        start = len(work.generated) // 4
        assert sorted(rows) == list(range(start, start + len(rows))), "a gap"
        return [rows[index] for index in sorted(rows)]

    def _on_batch(self, message: BusMessage) -> None:
        batch = self._codecs.to_gateway.decode(message.payload)
        assert isinstance(batch, TokenBatch)
        if self.lose:
            self.lose -= 1
            return
        due = self.next_seq.get(batch.incarnation, 0)
        self.next_seq[batch.incarnation] = max(due, batch.batch_seq + 1)
        if batch.batch_seq > due:
            self._ask_again(batch.incarnation)
        self.num_ends += len(batch.ends)
        columns = (unpack_tokens(column).tolist() for column in (batch.stream_ids, batch.indices, batch.tokens))
        for stream_id, index, token in zip(*columns, strict=True):
            held = self.tokens.setdefault(stream_id, {}).setdefault(index, token)
            assert held == token, "two tokens for one index"
        if batch.logprobs is not None:
            ids, indices = unpack_tokens(batch.stream_ids).tolist(), unpack_tokens(batch.indices).tolist()
            for row, found in unpack_logprobs(batch.logprobs, len(ids)):
                known = self.logprobs.setdefault(ids[row], {}).setdefault(indices[row], found)
                assert known == found, "two log-probabilities for one index"
        for end in batch.ends:
            self.ends.setdefault(end.stream_id, end)
        self.cached.update(dict(batch.cached))
        for spent in batch.spent:
            self.spent[batch.incarnation, spent.stream_id] = spent
        if self.acks and batch.ends:
            ack = EndAck(self.incarnation, tuple(end.stream_id for end in batch.ends))
            for worker in self._cluster.workers:
                if worker.incarnation == batch.incarnation:
                    self._tasks.spawn(self.tell(worker, ack), "ack")
        self._changed.set()

    def _ask_again(self, incarnation: int) -> None:
        """A gap: ask for every live stream from the first index that is missing."""
        for worker in self._cluster.workers:
            if worker.incarnation == incarnation:
                streams = tuple((stream, self._first_missing(stream)) for stream in sorted(self._live[incarnation]))
                self._tasks.spawn(self.tell(worker, Resend(self.incarnation, streams)), "resend")

    def _first_missing(self, stream_id: int) -> int:
        rows = self.tokens.get(stream_id, {})
        return next(index for index in range(len(rows) + 1) if index not in rows)

    def forget(self, work: Work) -> None:
        """Leave a stream out of the heartbeats from now on."""
        for streams in self._live.values():
            streams.discard(work.stream_id)

    async def _beat(self) -> None:
        subject = beat_subject("dev", "gateway", self._name, self.incarnation)
        beat = 0
        while True:
            if self.beating:
                beat += 1
                live = tuple((worker, tuple(sorted(ids))) for worker, ids in self._live.items())
                message = GatewayHeartbeat(beat, self._name, self.incarnation, self.subject, 1, live)
                with contextlib.suppress(BusUnavailable):  # a test has stopped the broker
                    await self._bus.publish(subject, self._codecs.beat.encode(message))
            self._changed.set()
            await asyncio.sleep(0.25)
