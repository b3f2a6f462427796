"""The shell of a worker: what prefill and decode have in common. I/O is here, decisions are in the scheduler.

    start -> serve -> drain -> stop

What comes over the bus is in `inbox.py`, the steps in `engine_loop.py`, what goes out in `outbox.py`.

Threads: the event loop (this file, the bus, every decision), the engine lane (`ModelRunner.execute`), the copy
lane (gather, scatter, checksums), and the data plane's own where it has one. Only the event loop changes
scheduler, pool and ledger; the engine lane gets immutable `StepPlan`s.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from kvferry.bus.base import Bus
from kvferry.bus.liveness import BEAT_INTERVAL
from kvferry.errors import BusError
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import Runtime, TaskSet, now
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Dropped, Emission, Key, ModelLimits, Sequence
from kvferry.schedule.step import ModelRunner
from kvferry.trace.span import SpanExporter
from kvferry.trace.tracer import Tracer
from kvferry.transport.base import Connection, Transport
from kvferry.transport.slots import SlotPool
from kvferry.wire.messages import (
    Codecs,
    DecodeRequest,
    EndReason,
    Heartbeat,
    PrefillRequest,
    PullTime,
    RejectReason,
    Role,
    WorkerState,
)
from kvferry.wire.subjects import beat_subject, cache_subject, mail_subject, process_subject
from kvferry.worker.cache_news import CacheNews
from kvferry.worker.digests import Digests
from kvferry.worker.engine_loop import EngineLoop
from kvferry.worker.fences import Fences
from kvferry.worker.grammars import Grammars
from kvferry.worker.inbox import Inbox
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.outbox import Outbox
from kvferry.worker.report import held, load, record
from kvferry.worker.scheduler import Decision, Scheduler
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.traces import Traces

log = get_logger(__name__)
S = TypeVar("S", bound=Scheduler)
HAND_OVER_S: Final = 0.75  # for the ends that a drain leaves to be confirmed, one repeat included


@dataclass(frozen=True, slots=True)
class Parts:
    """What a worker is made of; a simulation gives in-memory twins."""

    runtime: Runtime
    bus: Bus
    transport: Transport
    slots: SlotPool
    runner: ModelRunner
    incarnation: int
    model_name: str
    pid: int
    engine: str = ""
    engine_reason: str = ""
    grammars: GrammarCompiler | None = None  # None: requests with a grammar end in an error
    spans: SpanExporter | None = None  # None: no traces
    vocabulary_id: str = ""  # of the model's tokenizer, where it is known


class Worker(ABC, Generic[S]):
    """One worker process. Subclasses add what their phase does with a request and with the data plane."""

    role: ClassVar[Role]

    def __init__(self, settings: WorkerSettings, parts: Parts, scheduler: S) -> None:
        self.settings = settings
        self.runtime = parts.runtime
        self.bus = parts.bus
        self.transport = parts.transport
        self.slots = parts.slots
        self.runner = parts.runner
        self.incarnation = parts.incarnation
        self.model_name = parts.model_name
        self.scheduler = scheduler
        self.metrics = WorkerMetrics()
        self.metrics.identity.labels(parts.model_name, self.role, parts.engine).set(1)
        self.state: WorkerState = "loading"
        self.process = process_subject(settings.cluster, self.role, settings.name, parts.incarnation)
        self.subject = mail_subject(self.process, "gateway")  # as gateways are told
        self.draining = asyncio.Event()  # asked for over the bus
        self.wedged = asyncio.Event()
        self.digests = Digests(enabled=settings.debug_digests)
        self.outbox = Outbox(parts.incarnation)
        self.tasks = TaskSet(self._task_failed)
        self.copy_lane: Lane = parts.runtime.lane("copy")
        news = cache_subject(settings.cluster, self.role, settings.name, parts.incarnation)
        pool = scheduler.memory.pool
        self.cache_news = CacheNews(pool, parts.incarnation, parts.bus, news, self.copy_lane, self.tasks)
        self.debug_port = 0
        self.pid = parts.pid
        self.engine = parts.engine
        self.engine_reason = parts.engine_reason
        self.vocabulary_id = parts.vocabulary_id
        self.fences = Fences()
        self.grammars = Grammars(self, parts.grammars)
        self.tracer = None if parts.spans is None else Tracer(parts.runtime, parts.spans, self.metrics.spans)
        self.traces = Traces(self, self.tracer)
        self.engine_loop = EngineLoop(self)
        self._inbox = Inbox(self)
        self._codecs = Codecs()
        self._mail = asyncio.Event()
        self._beaten = asyncio.Event()
        self._beat = 0
        self._freeing: list[tuple[Sequence, float]] = []  # cancelled ones whose blocks are in use, and since when
        self._loops: list[asyncio.Task[None]] = []

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve: bus, data plane and model are up already."""
        await self._inbox.open()
        self.state = "ready"
        self._loops += [
            self.tasks.spawn(self.engine_loop.run(), "engine"),
            self.tasks.spawn(self._publish_loop(), "publish"),
            self.tasks.spawn(self._beat_loop(), "beat"),
        ]

    async def drain(self) -> None:
        """Take no more; let what runs finish within the grace time, hand the rest back to the gateways."""
        if self.state == "draining":
            return
        self.state = "draining"
        log.info("draining", sequences=len(self.scheduler.sequences))
        self.drop(*self.scheduler.drain())
        deadline = now() + self.settings.drain_grace
        await self._let_end(deadline - HAND_OVER_S)
        self.drop(*self.scheduler.hand_over())
        await self._flush()
        await self._let_end(deadline)

    async def _let_end(self, deadline: float) -> None:
        """Wait until every sequence has ended and every end is confirmed, while somebody is there to confirm."""
        while now() < deadline and (self.scheduler.sequences or (len(self.outbox) and self.bus.connected)):
            self._beaten.clear()
            await self._beaten.wait()  # each heartbeat looks again

    async def stop(self) -> None:
        """End everything; afterwards no task, thread, subscription or endpoint of this worker is left."""
        # From the sources of new work to those that only serve it, so that nothing starts behind our back.
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self._inbox.close()
        self.engine_loop.close()
        self.grammars.close()
        self.scheduler.abandon_step("stopped")  # whose result nobody takes any more
        await self.disconnect()
        await self.transport.close()
        await self.copy_lane.drain()  # what copies still run hold slots and pins
        await self.tasks.cancel()
        self.copy_lane.close()
        if self.tracer is not None:
            await self.tracer.close()
        await self.bus.close()

    # -- what a phase adds -----------------------------------------------------------------------------------

    @abstractmethod
    def accept(self, request: PrefillRequest | DecodeRequest, sequence: Sequence) -> RejectReason | None:
        """Queue a checked request, or say why not."""

    @abstractmethod
    def decide(self, moment: float) -> Decision:
        """Ask the scheduler for the next step and carry out what it decided besides."""

    @abstractmethod
    def stepped(self, emissions: list[Emission]) -> None:
        """A step has ended and its tokens are in the outbox."""

    @abstractmethod
    def released(self, sequence: Sequence, reason: str) -> None:
        """The sequence is gone from the scheduler, dropped for a reason or "cancelled": end its pull."""

    @abstractmethod
    def tick(self, moment: float) -> None:
        """Every heartbeat: deadlines of the phase."""

    def take_pulls(self) -> tuple[PullTime, ...]:
        """The pulls into this worker that have ended since the last call. The default has none."""
        return ()

    @abstractmethod
    def attach(self, connection: Connection) -> None:
        """A peer has connected on the data plane and proved the data key."""

    async def disconnect(self) -> None:
        """End what the phase has open on the data plane. The default has nothing."""
        return

    # -- the engine ------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed that may give the engine work."""
        self.engine_loop.wake()

    def mail(self) -> None:
        """Something waits in the outbox."""
        self._mail.set()

    def emit(self, emission: Emission) -> None:
        """Put what a step gave a sequence, and the end it may be, into the outbox."""
        work = emission.sequence.work
        if emission.scores is not None:
            self.outbox.scored(work, emission.scores)
        if emission.token is not None:
            self.outbox.token(work, emission.index, emission.token, emission.logprobs)
        if emission.reason is not None:
            self._end(emission.sequence, emission.reason, "")
        self.mail()

    # -- ends ------------------------------------------------------------------------------------------------

    def drop(self, *dropped: Dropped) -> None:
        """Tell the gateways that this worker gave sequences up (the scheduler has forgotten them)."""
        for item in dropped:
            if item.reason == "preempted":
                self.metrics.preemptions.inc()
            elif item.reason == "expired":
                self.metrics.lease_expiries.inc()
            log.info(
                "sequence dropped",
                request_id=item.sequence.work.request_id,
                attempt=item.sequence.work.attempt,
                reason=item.reason,
                detail="" if item.reason == "grammar" else item.detail,  # quotes the request
            )
            self._end(item.sequence, item.reason, item.detail)
            self.released(item.sequence, item.reason)
        if dropped:
            self.mail()
            self.wake()

    def _end(self, sequence: Sequence, reason: EndReason, detail: str) -> None:
        self.outbox.end(sequence.work, reason, detail, now())
        self.fences.end(sequence.work, now())
        self.traces.ended(sequence, reason)

    def cancel(self, key: Key) -> bool:
        """The gateway wants nothing more of an attempt: forget it in whatever phase it is."""
        sequence = self.scheduler.cancel(key)
        if sequence is None:
            return False
        self.metrics.cancels.inc()
        self._freeing.append((sequence, now()))
        self.observe_freed()
        self.outbox.close(sequence.work)
        self.fences.cancel(sequence.work, now())
        self.traces.ended(sequence, "cancelled")
        self.released(sequence, "cancelled")
        self.wake()
        return True

    def forget(self, sequence: Sequence, outcome: str) -> None:
        """This worker's part of the attempt is over, and nothing more will be said of it."""
        self.outbox.leave(sequence.work)
        self.fences.end(sequence.work, now())
        self.traces.ended(sequence, outcome)

    def unpin(self, sequence: Sequence) -> None:
        """A gather or scatter has ended."""
        if self.scheduler.memory.unpin(sequence):
            self.observe_freed()
            self.wake()

    def observe_freed(self) -> None:
        """Measure the cancelled sequences whose blocks are free by now."""
        moment = now()
        for sequence, since in self._freeing:
            if not sequence.doomed:
                self.metrics.cancel_seconds.observe(moment - since)
        self._freeing = [item for item in self._freeing if item[0].doomed]

    # -- publishing ------------------------------------------------------------------------------------------

    async def _publish_loop(self) -> None:
        while True:
            await self._mail.wait()
            self._mail.clear()
            await self._flush()

    async def _flush(self) -> None:
        for subject, batch in self.outbox.take():
            try:
                await self.bus.publish(subject, self._codecs.to_gateway.encode(batch))
            except BusError:
                continue  # the gap in batch_seq makes the gateway ask again

    async def _beat_loop(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            moment = loop.time()
            self._inbox.tick(moment)
            self.fences.expire(moment)
            self.drop(*self.scheduler.expire(moment))
            self._watch_step(self.engine_loop.stuck_s(moment))
            self.tick(moment)
            self.outbox.repeat_ends(moment)
            self.mail()
            await self.cache_news.publish()
            await self._publish_beat()
            self._beaten.set()
            due = max(due + BEAT_INTERVAL, loop.time())
            await asyncio.sleep(due - loop.time())

    def _watch_step(self, seconds: float) -> None:
        """The step that runs has taken so long."""
        if seconds > self.settings.step_timeout:
            if self.state != "wedged":
                log.error("wedged: no engine step ended", seconds=round(seconds, 1))
            self.state = "wedged"
            self.wedged.set()

    async def _publish_beat(self) -> None:
        self._beat = (self._beat + 1) & 0xFFFFFFFF
        beat = Heartbeat(self._beat, self.state, record(self), load(self), held(self))
        subject = beat_subject(self.settings.cluster, self.role, self.settings.name, self.incarnation)
        try:
            await self.bus.publish(subject, self._codecs.beat.encode(beat))
        except BusError:
            return  # the next one is 250 ms away

    # -- health ----------------------------------------------------------------------------------------------

    def check_integrity(self) -> None:
        """Pool, ledger and slots agree. For tests and `/debug/blocks`."""
        self.scheduler.memory.check_integrity()
        self.slots.check_integrity()

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)
        if name in ("engine", "publish", "beat"):
            # Without one of these the worker would look alive and do nothing.
            self.state = "wedged"
            self.wedged.set()


def model_limits(runner: ModelRunner) -> ModelLimits:
    return ModelLimits(runner.max_model_len, runner.eos_token_ids)


def kv_memory(runner: ModelRunner) -> KVMemory:
    return KVMemory(runner.num_blocks, runner.kv_format.block_size)


MakeWorker = Callable[[Any, Parts], Worker[Any]]
