"""A prefill and a decode worker that compute nothing: the real bus, the real protocol, tokens out of a hat.

python -m bench.gateway_fleet CLUSTER MODEL MODEL_DIR     reads commands on stdin, answers on stdout, a JSON line each

P accepts, and says token 0 at once. D accepts, and waits for a command:

    {"rate": 50, "streams": 32}    once so many wait, one batch for all of them, so many times a second, until all have
                                   their `max_tokens`; 0: in bursts of many at once. Answered by when each was said, of
                                   `blocking_clock`: {"published": [seconds, …]}; the first has each stream's token 0

A request of one token is P's alone.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

import numpy as np
import uvloop

from bench.command_lines import commands, tell
from kvferry.bus.base import BusMessage, BusSettings
from kvferry.bus.liveness import BEAT_INTERVAL
from kvferry.bus.nats import NatsBus
from kvferry.bus.rights import BusRole, user_name
from kvferry.log import setup_logging
from kvferry.rhythm import Rhythm
from kvferry.runtime import SystemRuntime, TaskSet, blocking_clock
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer
from kvferry.text.vocabulary import vocabulary_id
from kvferry.wire.beats import Heartbeat, Held, Load, SequenceState
from kvferry.wire.fields import Role
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Cancel, EndAck, Ping, Pong
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry.wire.subjects import beat_subject, inbox_prefix, mail_subject, process_subject
from kvferry.wire.tokens import End, TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Work

URL_VARIABLE: Final = "KVFERRY_NATS_URL"
PASSWORD_VARIABLE: Final = "KVFERRY_NATS_PASSWORD"
NUM_BLOCKS: Final = 1 << 20
LOAD: Final = Load(free_blocks=NUM_BLOCKS, prefill_tokens_per_s=1e7, decode_step_s=0.02)
FIRST_TOKEN: Final = 1000  # tokens are drawn from those that make up most texts
END_TOKEN: Final = 5000
NUM_DRAWN: Final = 1 << 16
BURST: Final = 250  # batches that are said at once where no rate is given
COMING_S: Final = 10.0  # the longest way of a request to D, after its token 0
BURST_PAUSE_S: Final = 0.5  # for the gateway to catch up: heartbeats wait behind them


@dataclass(slots=True)
class Row:
    """A sequence on D."""

    work: Work
    state: SequenceState = "waiting"
    next_index: int = 0


class Worker:
    """What both workers do: beat, accept, answer pings, say tokens."""

    role: ClassVar[Role]

    def __init__(self, bus: NatsBus, cluster: str, model: str, directory: ModelDir) -> None:
        incarnation, role = SystemRuntime().random_u64(), self.role
        self._bus = bus
        self._tokens = _tokens(directory)
        self._subject = mail_subject(process_subject(cluster, role, f"{role}-0", incarnation), "gateway")
        self._beats = beat_subject(cluster, role, f"{role}-0", incarnation)
        self._record = WorkerRecord(
            role=role, name=f"{role}-0", incarnation=incarnation, pid=os.getpid(), subject=self._subject, model=model,
            transport="none", address=WorkerAddress(incarnation, ("none",)), kv_format_id="none", numerics_id="none",
            max_model_len=directory.max_context, block_size=16, num_blocks=NUM_BLOCKS, kv_token_bytes=1, grammars=True,
            vocabulary_id=vocabulary_id(directory.tokenizer_path),
        )  # fmt: skip
        self._codecs = Codecs()
        self._batch_seq: dict[str, int] = {}  # by gateway
        self._tasks = TaskSet(lambda name, error: sys.exit(f"{name}: {error!r}"))
        self._num_beats = 0
        self._rhythm = Rhythm(BEAT_INTERVAL)

    async def start(self) -> None:
        await self._bus.subscribe(self._subject, self._on_message)
        self._tasks.spawn(self._beat(), "beat")

    def accepted(self, work: Work) -> None:
        """It was taken, and its gateway has been told."""

    def held(self) -> Iterator[tuple[str, Held]]:
        """(gateway, row of the heartbeat)."""
        return iter(())

    def over(self, message: Cancel | EndAck) -> None:
        """A gateway wants no more of some sequences."""

    async def say(
        self, gateway: str, rows: tuple[np.ndarray, np.ndarray, np.ndarray], ends: tuple[End, ...] = ()
    ) -> None:
        """One batch of (stream_ids, indices, tokens)."""
        seq = self._batch_seq.get(gateway, 0)
        self._batch_seq[gateway] = seq + 1
        stream_ids, indices, tokens = (column.astype("<u4").tobytes() for column in rows)
        batch = TokenBatch(self._record.incarnation, seq, stream_ids, indices, tokens, ends)
        subject = mail_subject(gateway.rpartition(".")[0], self.role)
        await self._bus.publish(subject, self._codecs.to_gateway.encode(batch))
        self._rhythm.ride()  # as the product's workers do

    def token(self, index: int) -> int:
        return self._tokens[index % NUM_DRAWN]

    def _on_message(self, message: BusMessage) -> None:
        match self._codecs.to_worker.decode(message.payload):
            case PrefillRequest(work) | DecodeRequest(work):
                self._tasks.spawn(self._accept(message, work), "accept")
            case Cancel() | EndAck() as over:
                self.over(over)
            case Ping(nonce):
                pong = self._codecs.answer.encode(Pong(nonce, self._record.incarnation))
                self._tasks.spawn(message.respond(pong), "pong")

    async def _accept(self, message: BusMessage, work: Work) -> None:
        await message.respond(self._codecs.answer.encode(Accepted(work.ticket, work.attempt)))
        self.accepted(work)

    async def _beat(self) -> None:
        while True:
            sequences: dict[str, list[Held]] = {}
            for gateway, row in self.held():
                sequences.setdefault(gateway, []).append(row)
            rows = {gateway: tuple(held) for gateway, held in sequences.items()}
            self._num_beats += 1
            beat = Heartbeat(self._num_beats, "ready", self._record, LOAD, rows)
            await self._bus.publish(self._beats, self._codecs.beat.encode(beat))
            await self._rhythm.turn()


class Prefill(Worker):
    """Says token 0, and the end if that is all."""

    role = "prefill"

    def accepted(self, work: Work) -> None:
        self._tasks.spawn(self._answer(work), "token 0")

    async def _answer(self, work: Work) -> None:
        whole = work.sampling.max_tokens == 1
        rows = (np.array([work.stream_id]), np.array([0]), np.array([self.token(0)]))
        await self.say(work.gateway, rows, (End(work.stream_id, 1, "length"),) if whole else ())


class Decode(Worker):
    """Says one token of every sequence in each step."""

    role = "decode"

    def __init__(self, bus: NatsBus, cluster: str, model: str, directory: ModelDir) -> None:
        super().__init__(bus, cluster, model, directory)
        self._rows: dict[int, Row] = {}  # by stream_id
        self._come = asyncio.Event()  # another one

    def accepted(self, work: Work) -> None:
        if work.sampling.max_tokens > 1:
            self._rows[work.stream_id] = Row(work)
            self._come.set()

    def held(self) -> Iterator[tuple[str, Held]]:
        for stream_id, row in self._rows.items():
            yield row.work.gateway, Held(stream_id, row.state, row.next_index)

    def over(self, message: Cancel | EndAck) -> None:
        if isinstance(message, EndAck):
            gone = list(message.stream_ids)
        else:
            gone = [stream_id for stream_id, row in self._rows.items() if row.work.ticket == message.ticket]
        for stream_id in gone:
            self._rows.pop(stream_id, None)

    async def run(self, rate: float, streams: int) -> list[float]:
        """Decode all that wait, at so many steps a second. Returns when each was said. A client may have token 0, which
        is P's, before the last request has come here."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(COMING_S):
            while len(begun := [row for row in self._rows.values() if row.state == "waiting"]) < streams:
                self._come.clear()
                await self._come.wait()
        for row in begun:
            row.state = "running"
        published: list[float] = []
        due = loop.time()
        while live := [row for row in begun if row.work.stream_id in self._rows and row.state == "running"]:
            published.append(blocking_clock())
            await self._step(live)
            due += 1 / rate if rate else 0.0
            if rate:
                await asyncio.sleep(max(0.0, due - loop.time()))
            elif len(published) % BURST == 0:
                await asyncio.sleep(BURST_PAUSE_S)
        return published

    async def _step(self, live: list[Row]) -> None:
        by_gateway: dict[str, list[Row]] = {}
        for row in live:
            by_gateway.setdefault(row.work.gateway, []).append(row)
        for gateway, rows in by_gateway.items():
            ids = np.fromiter((row.work.stream_id for row in rows), np.uint32, len(rows))
            indices = np.fromiter((row.next_index for row in rows), np.uint32, len(rows))
            tokens = np.fromiter((self.token(row.next_index) for row in rows), np.uint32, len(rows))
            ends = []
            for row in rows:
                row.next_index += 1
                if row.next_index == row.work.sampling.max_tokens:
                    row.state = "ended"
                    ends.append(End(row.work.stream_id, row.next_index, "length"))
            await self.say(gateway, (ids, indices, tokens), tuple(ends))


def _tokens(directory: ModelDir) -> list[int]:
    """The same for every stream: what is said at each index, modulo `NUM_DRAWN`."""
    special = Tokenizer(directory).special_token_ids
    drawn = np.random.default_rng(11).integers(FIRST_TOKEN, END_TOKEN, NUM_DRAWN).tolist()
    return [token if token not in special else FIRST_TOKEN for token in drawn]


async def _joined(role: BusRole, cluster: str) -> NatsBus:
    bus = NatsBus(
        BusSettings(
            os.environ[URL_VARIABLE], f"{role}-0", inbox_prefix(cluster, role),
            user_name(cluster, role), os.environ[PASSWORD_VARIABLE],
        ),
        SystemRuntime(),
    )  # fmt: skip
    await bus.start()
    return bus


async def serve(cluster: str, model: str, directory: ModelDir) -> None:
    prefill = Prefill(await _joined("prefill", cluster), cluster, model, directory)
    decode = Decode(await _joined("decode", cluster), cluster, model, directory)
    await prefill.start()
    await decode.start()
    tell(ready=True)
    async for command in commands():
        tell(published=await decode.run(command["rate"], command["streams"]))


if __name__ == "__main__":
    setup_logging("warning", "auto", service="bench")
    uvloop.run(serve(sys.argv[1], sys.argv[2], ModelDir(Path(sys.argv[3]))))
