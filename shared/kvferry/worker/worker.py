"""The shell of a worker: what prefill and decode have in common. I/O is here, decisions are in the scheduler.

    start -> serve -> drain -> stop

What comes over the bus is in `inbox.py`, the steps in `engine_loop.py`, what goes out in `outbox.py` and by `post.py`,
what happens at each heartbeat in `pulse.py`.

Threads: the event loop (this file, the bus, every decision), the engine lane (`ModelRunner.execute`), the copy
lane (gather, scatter, checksums), and the data plane's own where it has one. Only the event loop changes
scheduler, pool and ledger; the engine lane gets immutable `StepPlan`s.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from typing import ClassVar, Final, Generic, TypeVar

from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import TaskSet, now
from kvferry.schedule.sequence import Dropped, Emission, Key, Sequence
from kvferry.schedule.step import StepPlan
from kvferry.trace.tracer import Tracer
from kvferry.transport.base import Connection
from kvferry.wire.beats import PullTime, WorkerState
from kvferry.wire.fields import Role
from kvferry.wire.subjects import cache_subject, mail_subject, process_subject
from kvferry.wire.tokens import EndReason
from kvferry.wire.work import DecodeRequest, PrefillRequest, RejectReason
from kvferry.worker.cache_news import CacheNews
from kvferry.worker.digests import Digests
from kvferry.worker.engine_loop import EngineLoop
from kvferry.worker.fences import Fences
from kvferry.worker.grammars import Grammars
from kvferry.worker.handoff.shards import RemoteShard
from kvferry.worker.inbox import Inbox
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.outbox import Outbox
from kvferry.worker.parts import Parts
from kvferry.worker.post import Post
from kvferry.worker.pulse import Pulse
from kvferry.worker.report import spent
from kvferry.worker.scheduler import Decision, Scheduler
from kvferry.worker.settings import WorkerSettings
from kvferry.worker.traces import Traces

log = get_logger(__name__)
S = TypeVar("S", bound=Scheduler)
HAND_OVER_S: Final = 0.75  # for the ends that a drain leaves to be confirmed, one repeat included


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
        self.shards = parts.shards
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
        self.inbox = Inbox(self)
        self.post = Post(self)
        self.pulse = Pulse(self)
        self._freeing: list[tuple[Sequence, float]] = []  # cancelled ones whose blocks are in use, and since when
        self._loops: list[asyncio.Task[None]] = []

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to serve: bus, data plane and model are up already."""
        await self.inbox.open()
        self.state = "ready"
        self._loops += [
            self.tasks.spawn(self.engine_loop.run(), "engine"),
            self.tasks.spawn(self.post.run(), "publish"),
            self.tasks.spawn(self.pulse.run(), "beat"),
            *(self.tasks.spawn(self._hear(shard), "shard") for shard in self.shards),
        ]

    async def _hear(self, shard: RemoteShard) -> None:
        await shard.run()
        log.error("a rank on another host can no longer be told of hand-offs", rank=shard.rank)
        self.wedge()

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
        await self.post.flush()
        await self._let_end(deadline)

    async def _let_end(self, deadline: float) -> None:
        """Wait until every sequence has ended and every end is confirmed, while somebody is there to confirm."""
        while now() < deadline and (self.scheduler.sequences or (len(self.outbox) and self.bus.connected)):
            await self.pulse.next_beat()  # and look again

    async def stop(self) -> None:
        """End everything; afterwards no task, thread, subscription or endpoint of this worker is left."""
        # From the sources of new work to those that only serve it, so that nothing starts behind our back.
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await self.inbox.close()
        self.engine_loop.close()
        self.grammars.close()
        self.scheduler.abandon_step("stopped")  # whose result nobody takes any more
        await self.disconnect()
        for shard in self.shards:
            shard.close()
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

    def decide_ahead(self) -> StepPlan | None:
        """Plan the step behind the one that runs, where that needs no decision. The default never does."""
        return None

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

    def progress(self, sequence: Sequence) -> tuple[int, int]:
        """(done, total) of what its state does, as `Held` has them. The default knows of computing."""
        return (sequence.num_computed, sequence.num_context) if sequence.state == "computing" else (0, 0)

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

    def emit(self, emission: Emission) -> None:
        """Put what a step gave a sequence, and the end it may be, into the outbox. Who calls this wakes the post."""
        work = emission.sequence.work
        if emission.scores is not None:
            self.outbox.scored(work, emission.scores)
        if emission.token is not None:
            self.outbox.token(work, emission.index, emission.token, emission.logprobs)
            if emission.first_drawn:
                self.outbox.spent(work, spent(emission.sequence, now()))
        if emission.reason is not None:
            self._end(emission.sequence, emission.reason, "")

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
            self.post.wake()
            self.wake()

    def displace(self, urgent: Sequence) -> bool:
        """Whether a full queue has given up a sequence of a lower priority for this one."""
        dropped = self.scheduler.displace(urgent)
        if dropped is None:
            return False
        self.drop(dropped)
        return True

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

    # -- health ----------------------------------------------------------------------------------------------

    def wedge(self) -> None:
        """It gives nothing any more: its process is to end."""
        self.state = "wedged"
        self.wedged.set()

    def check_integrity(self) -> None:
        """Pool, ledger and slots agree. For tests and `/debug/blocks`."""
        self.scheduler.memory.check_integrity()
        self.slots.check_integrity()

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)
        if name in ("engine", "publish", "beat", "shard"):
            # Without one of these the worker would look alive and do nothing.
            self.wedge()
