"""The shell of a worker: what prefill and decode have in common. I/O is here, decisions are in the scheduler.

    start -> serve -> drain -> stop

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

from kvferry.bus.base import Bus, BusMessage, Subscription
from kvferry.bus.liveness import BEAT_INTERVAL, Liveness
from kvferry.errors import BusError, WireError
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import Runtime, TaskSet, now
from kvferry.schedule.memory import KVMemory
from kvferry.schedule.sequence import Dropped, Emission, Key, ModelLimits, Sequence
from kvferry.schedule.step import ModelRunner, StepPlan, StepResult
from kvferry.transport.base import Connection, Transport
from kvferry.transport.slots import SlotPool
from kvferry.wire.codec import WIRE_VERSION
from kvferry.wire.messages import (
    Accepted,
    Cancel,
    Codecs,
    DecodeRequest,
    Drain,
    EndAck,
    EndReason,
    Fence,
    GatewayHeartbeat,
    Heartbeat,
    Ping,
    Pong,
    PrefillRequest,
    Rejected,
    RejectReason,
    Resend,
    Role,
    Work,
    WorkerState,
)
from kvferry.wire.subjects import beat_subject, process_subject, role_beats
from kvferry.worker.admission import refuse, retry_after
from kvferry.worker.digests import Digests
from kvferry.worker.fences import Fences
from kvferry.worker.gateways import Gateways
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.outbox import Outbox
from kvferry.worker.report import held, load, record
from kvferry.worker.scheduler import Decision, Scheduler
from kvferry.worker.settings import WorkerSettings

log = get_logger(__name__)
S = TypeVar("S", bound=Scheduler)
STEP_SMOOTHING: Final = 0.1
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
        self.state: WorkerState = "loading"
        self.subject = process_subject(settings.cluster, self.role, settings.name, parts.incarnation)
        self.draining = asyncio.Event()  # asked for over the bus
        self.wedged = asyncio.Event()
        self.digests = Digests(enabled=settings.debug_digests)
        self.outbox = Outbox(parts.incarnation)
        self.tasks = TaskSet(self._task_failed)
        self.copy_lane: Lane = parts.runtime.lane("copy")
        self.debug_port = 0
        self.pid = parts.pid
        self.engine = parts.engine
        self.engine_reason = parts.engine_reason
        self._engine_lane: Lane = parts.runtime.lane("engine")
        self._codecs = Codecs()
        self._fences = Fences()
        self._subscriptions: list[Subscription] = []
        self._work = asyncio.Event()
        self._mail = asyncio.Event()
        self._beaten = asyncio.Event()
        self._sequence_ids = 0
        self.num_steps = 0
        self.step_s = 0.0  # mean of late
        self._step_began: float | None = None
        self._beat = 0
        self._bus_lost: float | None = None
        self._freeing: list[tuple[Sequence, float]] = []  # cancelled ones whose blocks are in use, and since when
        self._loops: list[asyncio.Task[None]] = []
        self._gateways = Gateways(parts.incarnation, Liveness(now()))

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve: bus, data plane and model are up already."""
        subscribe = self.bus.subscribe
        self.bus.on_change(self._bus_changed)
        self._subscriptions.append(await subscribe(self.subject, self._on_message))
        beats = role_beats(self.settings.cluster, "gateway")
        self._subscriptions.append(await subscribe(beats, self._on_gateway_beat))
        self.state = "ready"
        self._loops += [
            self.tasks.spawn(self._engine_loop(), "engine"),
            self.tasks.spawn(self._publish_loop(), "publish"),
            self.tasks.spawn(self._beat_loop(), "beat"),
        ]

    async def drain(self) -> None:
        """Take no more; let what runs finish within the grace time, hand the rest back to the gateways."""
        if self.state == "draining":
            return
        self.state = "draining"
        log.info("draining", sequences=len(self.scheduler.sequences))
        self._drop(self.scheduler.drain())
        deadline = now() + self.settings.drain_grace
        await self._let_end(deadline - HAND_OVER_S)
        self._drop(self.scheduler.hand_over())
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
        for subscription in self._subscriptions:
            await subscription.close()
        self._engine_lane.close()
        self.scheduler.abandon_step("stopped")  # whose result nobody takes any more
        await self.disconnect()
        await self.transport.close()
        await self.copy_lane.drain()  # what copies still run hold slots and pins
        await self.tasks.cancel()
        self.copy_lane.close()
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

    @abstractmethod
    def attach(self, connection: Connection) -> None:
        """A peer has connected on the data plane and proved the data key."""

    async def disconnect(self) -> None:
        """End what the phase has open on the data plane. The default has nothing."""
        return

    # -- the engine ------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed that may give the engine work."""
        self._work.set()

    def mail(self) -> None:
        """Something waits in the outbox."""
        self._mail.set()

    async def _engine_loop(self) -> None:
        while True:
            self._work.clear()  # before the decision: what it drops may give it work again
            decision = self.decide(now())
            self._drop(decision.dropped)
            if decision.plan is None:
                await self._work.wait()
                continue
            await self._step(decision.plan)
            self._observe_freed()

    async def _step(self, plan: StepPlan) -> None:
        began = self._step_began = now()
        try:
            result = await self._engine_lane.run(self.runner.execute, plan)
        except Exception as error:
            # A step that fails must cost its own sequences and nobody else's; their gateways count the failure.
            log.exception("engine step failed", num_tokens=plan.num_tokens)
            self._drop(self.scheduler.abandon_step(type(error).__name__))
            return
        finally:
            self._step_began = None
        self._account(plan, result, now() - began)
        emissions = self.scheduler.finish(plan, result, now())
        for emission in emissions:
            self.emit(emission)
        self.stepped(emissions)

    def emit(self, emission: Emission) -> None:
        """Put a token, and the end it may be, into the outbox."""
        work = emission.sequence.work
        self.outbox.token(work, emission.index, emission.token)
        if emission.reason is not None:
            self._end(emission.sequence, emission.reason, "")
        self.mail()

    def _account(self, plan: StepPlan, result: StepResult, seconds: float) -> None:
        self.num_steps += 1
        self.step_s += (seconds - self.step_s) * (STEP_SMOOTHING if self.step_s else 1.0)
        drawn = sum(token is not None for token in result.tokens)
        self.metrics.steps.observe(seconds)
        self.metrics.batch.set(len(plan.steps))
        self.metrics.tokens.labels("drawn").inc(drawn)
        self.metrics.tokens.labels("prefill").inc(sum(len(s.tokens) for s in plan.steps if len(s.tokens) > 1))

    # -- ends ------------------------------------------------------------------------------------------------

    def drop(self, dropped: Dropped) -> None:
        """Tell the gateway that this worker gave a sequence up (the scheduler has forgotten it)."""
        self._drop((dropped,))

    def _drop(self, dropped: tuple[Dropped, ...] | list[Dropped]) -> None:
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
                detail=item.detail,
            )
            self._end(item.sequence, item.reason, item.detail)
            self.released(item.sequence, item.reason)
        if dropped:
            self.mail()
            self.wake()

    def _end(self, sequence: Sequence, reason: EndReason, detail: str) -> None:
        self.outbox.end(sequence.work, reason, detail, now())
        self._fences.end(sequence.work, now())

    def cancel(self, key: Key) -> bool:
        """The gateway wants nothing more of an attempt: forget it in whatever phase it is."""
        sequence = self.scheduler.cancel(key)
        if sequence is None:
            return False
        self.metrics.cancels.inc()
        self._freeing.append((sequence, now()))
        self._observe_freed()
        self.outbox.close(sequence.work)
        self._fences.cancel(sequence.work, now())
        self.released(sequence, "cancelled")
        self.wake()
        return True

    def forget(self, work: Work) -> None:
        """This worker's part of the attempt is over, and nothing more will be said of it."""
        self.outbox.close(work)
        self._fences.end(work, now())

    def unpin(self, sequence: Sequence) -> None:
        """A gather or scatter has ended."""
        if self.scheduler.memory.unpin(sequence):
            self._observe_freed()
            self.wake()

    def _observe_freed(self) -> None:
        """Measure the cancelled sequences whose blocks are free by now."""
        moment = now()
        for sequence, since in self._freeing:
            if not sequence.doomed:
                self.metrics.cancel_seconds.observe(moment - since)
        self._freeing = [item for item in self._freeing if item[0].doomed]

    # -- messages from the bus -------------------------------------------------------------------------------

    def _on_message(self, message: BusMessage) -> None:
        try:
            request = self._codecs.to_worker.decode(message.payload)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            log.warning("message dropped", kind=error.kind, bytes=len(message.payload), version=WIRE_VERSION)
            return
        match request:
            case PrefillRequest() | DecodeRequest():
                self._answer(message, self._on_request(request))
            case Cancel(ticket, attempt):
                if not self.cancel((ticket, attempt)):
                    self._fences.bury((ticket, attempt), now())
            case Fence(worker, gateway, highest) if worker == self.incarnation:
                self._fences.fence(gateway, highest)
                for work in self._works_of(gateway) + self.outbox.ended(gateway):
                    if work.attempt <= highest and not self.cancel(work.key):
                        self.outbox.close(work)
            case Resend(gateway, streams):
                self.outbox.resend(gateway, streams)
                self.mail()
            case EndAck(gateway, streams):
                self.outbox.acknowledge(gateway, streams)
            case Ping(nonce):
                self._answer(message, Pong(nonce, self.incarnation))
            case Drain(worker) if worker == self.incarnation:
                self.draining.set()

    def _answer(self, message: BusMessage, answer: Accepted | Rejected | Pong) -> None:
        self.tasks.spawn(self._respond(message, self._codecs.answer.encode(answer)), "respond")

    async def _respond(self, message: BusMessage, payload: bytes) -> None:
        try:
            await message.respond(payload)
        except BusError:
            return  # the gateway asks again: answers are idempotent

    def _on_request(self, request: PrefillRequest | DecodeRequest) -> Accepted | Rejected:
        work = request.work
        if self._fences.is_repeat(work):
            return Accepted(work.ticket, work.attempt)
        reason = refuse(request, self.role, self.state, self.model_name, self.runner) or self._fences.check(work)
        if reason is None:
            self._gateways.seen(work.gateway_incarnation, now())  # its silence will free what is kept for it
            self._sequence_ids += 1
            kv_format = self.runner.kv_format
            sequence = Sequence(
                self._sequence_ids,
                work,
                kv_format.format_id,
                kv_format.block_size,
                self.runner.max_model_len,
                now(),
            )
            self.outbox.open(work)
            reason = self.accept(request, sequence)
            if reason is not None:
                self.outbox.close(work)
        if reason is not None:
            return Rejected(work.ticket, work.attempt, reason, retry_after(self.scheduler))
        older = self._fences.accept(work)
        if older is not None:
            self.cancel(older)
        self.wake()
        return Accepted(work.ticket, work.attempt)

    def _works_of(self, gateway_incarnation: int) -> list[Work]:
        sequences = self.scheduler.sequences.values()
        return [s.work for s in sequences if s.work.gateway_incarnation == gateway_incarnation]

    # -- gateways --------------------------------------------------------------------------------------------

    def _on_gateway_beat(self, message: BusMessage) -> None:
        try:
            beat = self._codecs.beat.decode(message.payload)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            return
        if not isinstance(beat, GatewayHeartbeat):
            return
        works = self._works_of(beat.incarnation) + self.outbox.ended(beat.incarnation)
        for work in self._gateways.observe(beat, works, now()):
            if not self.cancel(work.key):
                self.outbox.close(work)

    def _bus_changed(self, connected: bool) -> None:
        liveness = self._gateways.liveness
        if connected:
            liveness.bus_up(now())
            self._bus_lost = None
            self.mail()
        else:
            liveness.bus_down(now())
            self._bus_lost = now()

    def _judge_gateways(self, moment: float) -> None:
        self._gateways.liveness.tick(moment)
        for incarnation in self._gateways.gone(moment):
            works = self._works_of(incarnation)
            log.warning("gateway gone", incarnation=f"{incarnation:016x}", sequences=len(works))
            for work in works:
                self.cancel(work.key)
            self.outbox.forget_gateway(incarnation)
        if self._bus_lost is not None and moment - self._bus_lost >= self.settings.bus_grace:
            for key in list(self.scheduler.sequences):
                self.cancel(key)

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
            self._judge_gateways(moment)
            self._fences.expire(moment)
            self._drop(self.scheduler.expire(moment))
            self._watch_step(moment)
            self.tick(moment)
            self.outbox.repeat_ends(moment)
            self.mail()
            await self._publish_beat()
            self._beaten.set()
            due = max(due + BEAT_INTERVAL, loop.time())
            await asyncio.sleep(due - loop.time())

    def _watch_step(self, moment: float) -> None:
        if self._step_began is not None and moment - self._step_began > self.settings.step_timeout:
            if self.state != "wedged":
                log.error("wedged: no engine step ended", seconds=round(moment - self._step_began, 1))
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
