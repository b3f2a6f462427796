"""Data-plane messages and frames into real workers, from peers that hold the key and keep none of the rules.

A false decode worker pulls from a real prefill worker, and a false prefill worker answers a real decode worker's pulls,
on a virtual clock. Afterwards neither holds anything, and no sequence ran on KV that is not its prompt's.
"""

from __future__ import annotations

import asyncio
import random
from typing import Any, Final

from cluster import DATA_KEY, MODEL, Cluster, all_free, expected, settled
from fuzz.campaign import Batch, run_virtually
from fuzz.frames import SLOT_BYTES, Source, damaged, resealed
from fuzz.messages import Ids, Messages
from fuzz.spoiling import spoiled
from scripted_gateway import ScriptedGateway

from kvferry.engine.memory.runner import MemoryRunner
from kvferry.errors import WireError
from kvferry.runtime import now
from kvferry.transport.base import Connection, TransportSettings
from kvferry.transport.memory import MemoryTransport
from kvferry.wire.flow import (
    Abort,
    Aborted,
    Ack,
    Credit,
    Fetch,
    Flow,
    FlowCodec,
    Open,
    Progress,
    Unknown,
)
from kvferry.wire.frame import frame_tag
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.tokens import End
from kvferry.wire.work import DecodeRequest, PrefillRequest, Work

FROM_D: Final = Open | Fetch | Credit | Abort | Ack
FROM_P: Final = Unknown | Progress | Aborted
SAMPLING: Final = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
QUIET_S: Final = 40.0  # virtual: longer than a lease lasts
END_S: Final = 30.0  # virtual, of a sequence whatever its prefill worker does


def flow_plane(batch: Batch) -> None:
    run_virtually(batch, _batch)


async def _batch(batch: Batch) -> None:
    cluster = Cluster()
    prefill, decode = await cluster.prefill(), await cluster.decode()
    gateway = await cluster.gateway()
    number = 0
    while number < batch.num_cases:
        play = FalseDecode if batch.chance.random() < 0.5 else FalsePrefill
        number += await play(batch, cluster, gateway, number).run()
        for worker in cluster.workers:
            worker.check_integrity()
            assert worker.state == "ready", f"{worker.role} is {worker.state}"
    await asyncio.sleep(QUIET_S)
    assert all_free(*cluster.workers), [worker.scheduler.memory.ledger.rows(now()) for worker in cluster.workers]
    assert not any(worker.scheduler.sequences for worker in cluster.workers)
    work = await gateway.run([7] * 50, decode, prefill, sampling=SAMPLING)
    assert gateway.text(work) == expected([7] * 50, SAMPLING, 4)
    await settled(lambda: not any(len(worker.outbox) for worker in cluster.workers), 5.0)
    await cluster.stop()


class _Peer:
    """One false process for one request: its transport, its incarnation, its messages."""

    def __init__(self, batch: Batch, cluster: Cluster, gateway: ScriptedGateway, number: int) -> None:
        self.batch = batch
        self.cluster = cluster
        self.gateway = gateway
        self.chance: random.Random = batch.chance
        self.incarnation = cluster.runtime.random_u64()
        self.ids = Ids()
        self.messages = Messages(batch.chance, self.ids)
        self.codec = FlowCodec()
        self.num_cases = 0
        name = f"false-{number}"
        settings = TransportSettings(incarnation=self.incarnation, data_key=DATA_KEY)
        self.transport = MemoryTransport(settings, cluster.runtime, cluster.network, name)
        self.prompt = [batch.chance.randrange(256) for _ in range(batch.chance.randint(1, 120))]

    def send(self, connection: Connection, message: Any, *, right: bool = False) -> None:
        """One input: a message as it is, or what becomes of it."""
        payload = self.codec.encode(message)
        if not right and self.chance.random() < 0.3:
            payload = spoiled(self.chance, payload)[:4096]
        with self.batch.trying((type(self).__name__, payload)):
            connection.send_message(payload)
        self._count(payload)

    def _count(self, payload: bytes) -> None:
        self.num_cases += 1
        try:
            self.codec.decode(payload)
        except WireError:
            self.batch.count(mutated=True, valid=False)
        else:
            self.batch.count(mutated=True, valid=True)


class FalseDecode(_Peer):
    """Opens, fetches and acknowledges what and when it likes."""

    async def run(self) -> int:
        prefill = self.cluster.workers[0]
        await self.transport.start(lambda connection: None)
        connection = await self.transport.connect(prefill.transport.address, 1.0)
        work = self.gateway.work(self.prompt, sampling=SAMPLING)
        await self.gateway.ask(prefill, PrefillRequest(work))
        self.gateway.expect(work, prefill)
        self.ids.note("ticket", work.ticket)
        self.ids.note("attempt", work.attempt)
        self.ids.note("pull_id", 1, 2)
        self.ids.note("from_token", 0, 16, len(self.prompt))
        self._posted: dict[int, int] = {}
        connection.on_message(lambda payload: None)
        if self.chance.random() < 0.7:
            self.send(connection, Open(1, work.ticket, work.attempt), right=True)
        for _ in range(self.chance.randint(2, 12)):
            if connection.closed:
                break
            message = self.messages.any_of(FROM_D if self.chance.random() < 0.9 else Flow)
            if isinstance(message, Fetch | Credit):
                self._post(connection, message.pull_id, message.credits)
            self.send(connection, message)
            await asyncio.sleep(self.chance.choice((0.0, 0.001, 0.02, 0.3)))
        await connection.close()
        await self.gateway.cancel(work, prefill)
        self.gateway.forget(work)
        await self.transport.close()
        return self.num_cases

    def _post(self, connection: Connection, pull_id: int, credits: int) -> None:
        """Receives for what was asked for, as long as that is not what is odd about it."""
        first = self._posted.get(pull_id, 0)
        for frame in range(first, first + credits):
            connection.receive(frame_tag(pull_id, frame), memoryview(bytearray(SLOT_BYTES)))
        self._posted[pull_id] = first + credits


class FalsePrefill(_Peer):
    """Answers the pull of a real decode worker with right frames, wrong ones and none."""

    async def run(self) -> int:
        decode = self.cluster.workers[1]
        self.source = Source(MemoryRunner(MODEL), self.prompt, 0)
        self._first = expected(self.prompt, SAMPLING, 1)[0]
        self._honest = self.chance.random() < 0.4  # all of it right: such a pull must succeed
        self._number = 0
        self._pieces = self.source.pieces(self.chance)
        await self.transport.start(self._attach)
        work = self.gateway.work(self.prompt, sampling=SAMPLING)
        address = WorkerAddress(self.incarnation, (self.transport.address,))
        self.gateway.expect(work, decode)
        await self.gateway.ask(decode, DecodeRequest(work, address))
        # A sequence that its prefill worker calls cancelled is dropped without a word: the gateway knows already, or
        # misses it in the next heartbeats.
        sequences = decode.scheduler.sequences
        await self.gateway.until(lambda: work.stream_id in self.gateway.ends or work.key not in sequences, END_S)
        await asyncio.sleep(0.01)  # for an end on its way
        self._judge(work, self.gateway.ends.get(work.stream_id))
        self.gateway.forget(work)
        await self.transport.close()
        return max(1, self.num_cases)

    def _judge(self, work: Work, end: End | None) -> None:
        tokens = self.gateway.text(work)
        if end is not None and end.reason == "length":
            # A frame with a good checksum may carry anything; the first token is the false worker's own, too.
            assert len(tokens) == SAMPLING.max_tokens
            if self._honest:
                assert tokens == expected(self.prompt, SAMPLING, SAMPLING.max_tokens), "it ran on other KV"
        else:
            assert not self._honest, f"a right pull ended with {end}"
            assert not tokens, "it gave tokens without KV"

    def _attach(self, connection: Connection) -> None:
        connection.on_message(lambda payload: self._on_message(connection, bytes(payload)))

    def _on_message(self, connection: Connection, payload: bytes) -> None:
        message = self.codec.decode(payload)
        if not self._honest and self.chance.random() < 0.3:
            self.ids.note("pull_id", getattr(message, "pull_id", 0))
            self.send(connection, self.messages.any_of(FROM_P if self.chance.random() < 0.9 else Flow))
        match message:
            case Open(pull_id):
                self._number = 0
                self._pieces = self.source.pieces(self.chance)
                whole = len(self.prompt)
                self.send(connection, Progress(pull_id, True, whole, whole, 0.0), right=self._honest)
            case Fetch(pull_id, from_token, credits):
                self._pieces = [piece for piece in self._pieces if from_token == 0]
                self._serve(connection, pull_id, credits)
            case Credit(pull_id, credits):
                self._serve(connection, pull_id, credits)
            case Abort(pull_id):
                self.send(connection, Aborted(pull_id, self._number, "asked"), right=self._honest)
            case _:
                return

    def _serve(self, connection: Connection, pull_id: int, credits: int) -> None:
        for _ in range(credits):
            frame = self._frame(pull_id, self._number)
            with self.batch.trying((type(self).__name__, pull_id, self._number, frame)):
                connection.send(frame_tag(pull_id, self._number), memoryview(frame))
            self._number += 1
            self.num_cases += 1

    def _frame(self, pull_id: int, number: int) -> bytes:
        """The next frame, or what a false one makes of it."""
        if self._pieces:
            piece = self._pieces.pop(0)
            right = self.source.frame(piece, pull_id, number)
            if self._honest or self.chance.random() < 0.6:
                self.batch.count(mutated=True, valid=True)
                return right
            self.batch.count(mutated=True, valid=False)
            if self.chance.random() < 0.5:
                self._pieces.insert(0, piece)  # it is asked for again
                return damaged(self.chance, right)
            return resealed(self.chance, self.source, piece, pull_id, number)
        manifest = self.source.manifest_frame(self.source.manifest(number, self._first), pull_id, number)
        self.batch.count(mutated=True, valid=True)
        if self._honest or self.chance.random() < 0.7:
            return manifest
        return damaged(self.chance, manifest) if self.chance.random() < 0.5 else self.source.pad(pull_id, number)
