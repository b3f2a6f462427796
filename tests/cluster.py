"""A whole cluster in one process: real workers over in-memory bus, transport and model, on a virtual clock.

The engine lane takes as many virtual seconds as the runner says that a step took. A scripted gateway speaks
the bus protocol by hand, so that a test decides every message.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from memory_ranks import ranked_memory
from virtual_loop import VirtualLoop

from kvferry.bus.base import BusMessage, BusSettings
from kvferry.bus.memory import MemoryBroker, MemoryBus
from kvferry.engine.memory.runner import MemoryRunner, MemorySettings, continuation
from kvferry.engine.ranks.caches import Caches
from kvferry.errors import BusUnavailable
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.lane import InlineLane, Lane
from kvferry.runtime import SeededRuntime, TaskSet, now
from kvferry.schedule.step import ModelRunner, StepResult
from kvferry.trace.span import MemoryExporter
from kvferry.transport.base import TransportSettings
from kvferry.transport.memory import MemoryNetwork, MemoryTransport
from kvferry.transport.slots import SlotPool
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.fields import pack_tokens, unpack_tokens
from kvferry.wire.frame import HEADER_BYTES
from kvferry.wire.logprobs import TokenLogprobs, unpack_logprobs
from kvferry.wire.messages import Codecs, ToWorker
from kvferry.wire.orders import Cancel, EndAck, Resend
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import beat_subject, inbox_prefix, mail_subject, process_subject
from kvferry.wire.tokens import End, Spent, TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry.worker.handoff.channel import DirectChannel
from kvferry.worker.handoff.orders import Begin
from kvferry.worker.handoff.plane import ShardPlane, open_plane
from kvferry.worker.handoff.shards import RemoteShard
from kvferry.worker.parts import Parts
from kvferry.worker.report import address
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.worker import Worker
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker

P = ParamSpec("P")
T = TypeVar("T")
DATA_KEY = b"k" * 32
ACCEPT_S = 0.3  # as gateways wait for the answer to a placement
GREEDY = Sampling(temperature=0.0, max_tokens=8)
MODEL = MemorySettings(num_blocks=64, seconds_per_step=0.004, seconds_per_token=0.001)


class VirtualEngineLane(InlineLane):
    """A step has its effect when it begins, and ends when its own virtual seconds have passed; then the next begins."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Callable[[], None] | None, Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._busy = False

    def run_telling(
        self, began: Callable[[], None] | None, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> asyncio.Future[T]:
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.append((began, partial(call, *args, **kwargs), future))
        if not self._busy:
            self._begin()
        return future

    def take_back(self, future: asyncio.Future[Any]) -> bool:
        for waiting in self._waiting:
            if waiting[2] is future:
                self._waiting.remove(waiting)
                return future.cancel()
        return False

    def close(self) -> None:
        for *_, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def _begin(self) -> None:
        self._busy = bool(self._waiting)
        if not self._busy:
            return
        began, call, future = self._waiting.popleft()
        if began is not None:
            began()
        try:
            result = call()
        except Exception as error:
            future.set_exception(error)
            asyncio.get_running_loop().call_soon(self._begin)
            return
        seconds = result.seconds if isinstance(result, StepResult) else 0.0
        asyncio.get_running_loop().call_later(seconds, self._end, future, result)

    def _end(self, future: asyncio.Future[Any], result: Any) -> None:
        if not future.done():
            future.set_result(result)
        self._begin()


class SimulationRuntime(SeededRuntime):
    def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
        return VirtualEngineLane() if name == "engine" else InlineLane()


@dataclass
class Cluster:
    """In-memory planes and the processes on them."""

    runtime: SimulationRuntime = field(default_factory=lambda: SimulationRuntime(1))
    workers: list[Worker[Any]] = field(default_factory=list)
    # Of workers with ranks on other hosts.
    planes: dict[str, dict[ShardPlane, asyncio.Task[None]]] = field(default_factory=dict)
    shard_tasks: TaskSet = field(default_factory=lambda: TaskSet(_shard_failed))
    gateways: list[ScriptedGateway] = field(default_factory=list)
    tokenizer_path: Path | None = None  # with it, workers follow grammars
    spans: MemoryExporter | None = None  # of all processes; None: nothing is traced

    def __post_init__(self) -> None:
        self.broker = MemoryBroker(self.runtime)
        self.network = MemoryNetwork()

    async def prefill(self, name: str = "prefill-0", model: MemorySettings = MODEL, **settings: Any) -> PrefillWorker:
        made = PrefillSettings(name=name, model="memory", **{"debug_digests": True, **settings})
        worker = PrefillWorker(made, await self._parts(made, "prefill", model))
        await self._start(worker)
        return worker

    async def decode(self, name: str = "decode-0", model: MemorySettings = MODEL, **settings: Any) -> DecodeWorker:
        settings = {"watermark_blocks": 1, "debug_digests": True, **settings}
        made = DecodeSettings(name=name, model="memory", **settings)
        worker = DecodeWorker(made, await self._parts(made, "decode", model))
        await self._start(worker)
        return worker

    async def gateway(self, name: str = "gateway-0") -> ScriptedGateway:
        gateway = ScriptedGateway(self, name)
        await gateway.start()
        self.gateways.append(gateway)
        return gateway

    async def stop(self) -> None:
        """Stop everything; afterwards every book must add up."""
        for gateway in self.gateways:
            await gateway.stop()
        for worker in self.workers:
            await worker.stop()
        for worker in self.workers:
            check_clean(worker)
        while len(self.shard_tasks):  # they hear that their leaders are gone
            await asyncio.sleep(0.001)
        for planes in self.planes.values():
            for plane in planes:
                check_plane(plane)

    async def kill(self, worker: Worker[Any]) -> None:
        """As SIGKILL does: no goodbye on either plane."""
        self.workers.remove(worker)
        if isinstance(worker, DecodeWorker):
            worker._puller.close()  # the dead try nothing again
        self.broker.cut(worker.bus)  # type: ignore[arg-type]
        self.network.kill(worker.settings.name)
        for plane, running in self.planes.pop(worker.settings.name, {}).items():
            self.network.kill(plane.transport.address.rpartition("/")[2])
            running.cancel()
            await plane.tasks.cancel()
            await plane.transport.close()
        await worker.tasks.cancel()
        await worker.transport.close()
        await worker.bus.close()

    async def drain(self, worker: Worker[Any]) -> float:
        """As a service does on SIGTERM: drain, stop, be gone. The seconds that it took."""
        began = now()
        await worker.drain()
        await worker.stop()
        self.workers.remove(worker)
        check_clean(worker)
        return now() - began

    def bus(self, name: str, role: str) -> MemoryBus:
        return MemoryBus(self.broker, BusSettings("memory://", name, inbox_prefix("dev", role)), self.runtime)

    async def _parts(self, settings: Any, role: str, model: MemorySettings) -> Parts:
        incarnation = self.runtime.random_u64()
        bus = self.bus(settings.name, role)
        await bus.start()
        transport_settings = TransportSettings(incarnation=incarnation, data_key=DATA_KEY)
        runner = self._runner(settings, model)
        return Parts(
            runtime=self.runtime,
            bus=bus,
            transport=MemoryTransport(transport_settings, self.runtime, self.network, settings.name),
            slots=self._slots(),
            runner=runner,
            shards=await self._shards(settings, role, incarnation, runner),
            incarnation=incarnation,
            model_name=settings.source.served_name,
            pid=len(self.workers) + 1,
            grammars=self._grammars(model),
            spans=self.spans,
        )

    def _runner(self, settings: WorkerSettings, model: MemorySettings) -> ModelRunner:
        return ranked_memory(model, settings.tensor_parallel_size, num_remote=settings.remote_ranks)

    async def _shards(
        self, settings: WorkerSettings, role: str, incarnation: int, runner: ModelRunner
    ) -> tuple[RemoteShard, ...]:
        """The data planes of the ranks that are on other hosts, as far as this process can have such."""
        assert isinstance(runner, MemoryRunner)
        size, shards = settings.tensor_parallel_size, []
        await self._planes_ended(settings.name)
        for rank in range(size - settings.remote_ranks, size):
            own, theirs = DirectChannel.pair()
            store = Caches([runner.caches[rank]], runner.limits)
            name = f"{settings.name}-rank-{rank}"
            transport_settings = TransportSettings(incarnation=incarnation, data_key=DATA_KEY)
            transport = MemoryTransport(transport_settings, self.runtime, self.network, name)
            shard = RemoteShard(rank, own)
            slots = self._slots()
            begun = asyncio.create_task(
                shard.begin(
                    Begin(role == "prefill", incarnation, "memory", slots.num_slots, slots.slot_bytes - HEADER_BYTES)
                )
            )
            plane = await open_plane(theirs, store, lambda _, transport=transport: transport, self.runtime)
            assert plane is not None
            self.planes.setdefault(settings.name, {})[plane] = self.shard_tasks.spawn(plane.run(), name)
            await begun
            shards.append(shard)
        return tuple(shards)

    async def _planes_ended(self, name: str) -> None:
        """A rank's process takes part again once it has ended, which a frozen peer holds up."""
        while not all(running.done() for running in self.planes.get(name, {}).values()):
            await asyncio.sleep(0.001)

    def _slots(self) -> SlotPool:
        return SlotPool(8, 64 << 10)

    def _grammars(self, model: MemorySettings) -> GrammarCompiler | None:
        if self.tokenizer_path is None:
            return None
        return GrammarCompiler(self.tokenizer_path, model.vocab_size, model.eos_token_ids)

    async def _start(self, worker: Worker[Any]) -> None:
        await worker.transport.start(worker.attach)
        await worker.start()
        self.workers.append(worker)


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
        address = None
        asked: list[Awaitable[Accepted | Rejected]] = []
        if prefill is not None:
            address = address_of(prefill)
            asked.append(self.ask(prefill, PrefillRequest(work)))
            self.expect(work, prefill)
        asked.append(self.ask(decode, DecodeRequest(work, address)))
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


def virtual(scenario: Callable[[Cluster], Awaitable[None]], limit: float = 300.0) -> None:
    """Run a scenario on a virtual clock and check that it leaves nothing behind: no block, slot, stream or task."""

    async def body() -> None:
        cluster = Cluster()
        await scenario(cluster)
        await cluster.stop()
        left = [task.get_name() for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        assert not left, f"tasks left: {left}"

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit)) as runner:
        runner.run(body())


def address_of(worker: Worker[Any]) -> WorkerAddress:
    return address(worker)


async def settled(condition: Callable[[], bool], within: float) -> float:
    """Look each virtual millisecond (or thousandth of a longer limit) whether the condition holds, at most `within`
    seconds. Returns the seconds that it took."""
    began, step = now(), max(0.001, within / 1000)
    while not condition():
        assert now() - began <= within, f"not within {within} s"
        await asyncio.sleep(step)
    return now() - began


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + position * 7 + 3) % 251 for position in range(length)]


def all_free(*workers: Worker[Any]) -> bool:
    """Whether these workers hold no block and no slot."""
    return all(
        w.scheduler.memory.pool.num_free == w.scheduler.memory.pool.num_blocks and w.slots.num_free == w.slots.num_slots
        for w in workers
    )


def check_clean(worker: Worker[Any]) -> None:
    """After a worker's last request: every block is free or cached, every slot free, nothing is remembered."""
    worker.check_integrity()
    memory = worker.scheduler.memory
    assert not worker.scheduler.sequences, worker.scheduler.sequences
    assert memory.pool.num_free == memory.pool.num_blocks, memory.ledger.rows(now())
    assert not memory.ledger.rows(now())
    assert worker.slots.num_free == worker.slots.num_slots, worker.slots.snapshot()
    assert len(worker.outbox) == 0
    assert len(worker.tasks) == 0


def check_plane(plane: ShardPlane) -> None:
    """The same, of a rank on another host."""
    plane.slots.check_integrity()
    assert plane.slots.num_free == plane.slots.num_slots, plane.slots.snapshot()
    assert len(plane.server) == len(plane.fetcher) == len(plane.tasks) == 0


def _shard_failed(name: str, error: BaseException) -> None:
    raise AssertionError(f"{name} has failed") from error


def expected(prompt: list[int], sampling: Sampling, count: int, model: MemorySettings = MODEL) -> list[int]:
    """What any right run must produce."""
    return continuation(model, prompt, sampling, 0, count)
