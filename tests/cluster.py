"""A whole cluster in one process: real workers over in-memory bus, transport and model, on a virtual clock.

A gateway is scripted (`scripted_gateway.py`), or there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory_ranks import ranked_memory
from scripted_gateway import ScriptedGateway
from virtual_engine import SimulationRuntime
from virtual_loop import VirtualLoop

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import MemoryBroker, MemoryBus
from kvferry.engine.memory.runner import MemoryRunner, MemorySettings, continuation
from kvferry.engine.ranks.caches import Caches
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.runtime import TaskSet, now
from kvferry.schedule.step import ModelRunner
from kvferry.trace.span import MemoryExporter
from kvferry.transport.base import TransportSettings
from kvferry.transport.memory import MemoryNetwork, MemoryTransport
from kvferry.transport.slots import SlotPool
from kvferry.wire.frame import HEADER_BYTES
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import inbox_prefix
from kvferry.worker.handoff.channel import DirectChannel
from kvferry.worker.handoff.orders import Begin
from kvferry.worker.handoff.plane import ShardPlane, open_plane
from kvferry.worker.handoff.shards import RemoteShard
from kvferry.worker.parts import Parts
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.worker import Worker
from kvferry_decode.settings import DecodeSettings
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.settings import PrefillSettings
from kvferry_prefill.worker import PrefillWorker

DATA_KEY = b"k" * 32
GREEDY = Sampling(temperature=0.0, max_tokens=8)
MODEL = MemorySettings(num_blocks=64, seconds_per_step=0.004, seconds_per_token=0.001)


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
