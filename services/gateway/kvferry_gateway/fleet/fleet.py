"""The workers as this gateway knows them: who lives, what each is asked and has told, and when one is gone.

In, through `Inbox`: token batches, heartbeats, exit notices, cache news. Out, through `Mail`: requests, cancels,
acknowledgements; and every `BEAT_INTERVAL` the gateway's own heartbeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Final

from kvferry.bus.base import Bus
from kvferry.bus.liveness import BEAT_INTERVAL, Seen
from kvferry.errors import BusError, NoResponders
from kvferry.log import get_logger
from kvferry.rhythm import Rhythm
from kvferry.runtime import Runtime, TaskSet, now
from kvferry.trace.span import SpanExporter
from kvferry.trace.tracer import Tracer
from kvferry.wire.beats import ExitNotice, GatewayHeartbeat, Heartbeat
from kvferry.wire.messages import CacheNews, Codecs
from kvferry.wire.record import WorkerRecord
from kvferry.wire.subjects import beat_subject, process_subject
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import DecodeRequest, PrefillRequest
from kvferry_gateway.fleet.inbox import Inbox, Reader
from kvferry_gateway.fleet.mail import Mail, Reply, Unreachable
from kvferry_gateway.fleet.news import News, Waiting
from kvferry_gateway.fleet.registry import Registry
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.models import ServedModel
from kvferry_gateway.placement.placer import Placer
from kvferry_gateway.placement.targets import Targets
from kvferry_gateway.reasons import LostReason
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.streams.attempt import Attempt, AttemptTable, Lost, audit
from kvferry_gateway.streams.dispatcher import Dispatcher
from kvferry_gateway.streams.stream import TokenStream
from kvferry_gateway.streams.timeline import Timelines

MAX_FENCES: Final = 4096  # workers that are gone and may come back
MAX_OBJECTIONS_LOGGED: Final = 4  # of one new worker; /v1/cluster has them all

log = get_logger(__name__)


class Fleet(Reader):
    """Registry, attempts and dispatcher of one gateway, and what a worker's words and silence mean to them."""

    def __init__(
        self,
        settings: GatewaySettings,
        runtime: Runtime,
        bus: Bus,
        metrics: GatewayMetrics,
        pid: int,
        models: Iterable[ServedModel],
        targets: Mapping[str, Targets],
        spans: SpanExporter | None = None,
    ) -> None:
        """`targets`: of each model. Without `spans` nothing is traced."""
        self.settings = settings
        self.runtime = runtime
        self.metrics = metrics
        self.tracer = None if spans is None else Tracer(runtime, spans, metrics.spans, settings.trace_sample_ratio)
        self.incarnation = runtime.random_u64()
        self.subject = process_subject(settings.cluster, "gateway", settings.name, self.incarnation)
        self.registry = Registry(now(), {model.name: model.vocabulary_id for model in models})
        self.placers = {model: Placer(aims, settings.local_prefill_threshold) for model, aims in targets.items()}
        self.table = AttemptTable()
        self.timelines = Timelines()
        self.tasks = TaskSet(self._task_failed)
        self.failed = asyncio.Event()  # a task without which this gateway is of no use has ended
        self.attached: dict[TokenStream, None] = {}  # streams that want a comment in silence
        self.waiting: dict[int, Waiting] = {}  # by the unit's number
        self.news = News()
        self.mail = Mail(bus, self.incarnation, self.registry, metrics)
        self._inbox = Inbox(bus, settings.cluster, self.subject, self.registry, metrics, self)
        self._bus = bus
        self._dispatcher = Dispatcher(self.table, self.mail, metrics)
        self._codecs = Codecs()
        self._pid = pid
        self._attempts = 0
        self._beat = 0
        self._rhythm = Rhythm(BEAT_INTERVAL)
        self._fences: dict[int, int] = {}  # incarnation that is gone -> highest attempt it may have

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `BusUnavailable`."""
        self._bus.on_change(self._bus_changed)
        await self._inbox.open()
        self.tasks.spawn(self.mail.post.run(), "post")
        self.tasks.spawn(self._beat_loop(), "beat")

    async def stop(self) -> None:
        """What was posted is published first. The bus is left open."""
        if self._bus.connected:
            await self.mail.post.flushed()
        await self.tasks.cancel()
        await self._inbox.close()
        if self.tracer is not None:
            await self.tracer.close()

    # -- requests --------------------------------------------------------------------------------------------

    def mail_from(self, role: str) -> str:
        """Where workers of a role write to this gateway."""
        return self._inbox.mail_from(role)

    def new_attempt_number(self) -> int:
        self._attempts += 1
        return self._attempts

    async def ask(self, worker: WorkerRecord, request: PrefillRequest | DecodeRequest) -> Reply:
        """Offer a request to a worker, which is suspected if it keeps silent. Never raises."""
        reply = await self.mail.ask(worker, request, self.settings.accept_timeout)
        if reply is None:
            self.suspect(worker)
            return Unreachable()
        return reply

    def confirm_end(self, attempt: Attempt) -> None:
        """Its end has done its work."""
        if attempt.end is not None:
            self._dispatcher.acknowledge(attempt.end_from, attempt.stream_id)

    # -- messages from workers -------------------------------------------------------------------------------

    def take_batch(self, batch: TokenBatch) -> None:
        self.registry.liveness.heard(batch.incarnation, now())
        self._dispatcher.take(batch)
        self._rhythm.ride()

    def take_cache_news(self, news: CacheNews) -> None:
        if (placer := self._placer_of(news.incarnation)) is not None:
            placer.hear(news)

    def take_exit(self, notice: ExitNotice) -> None:
        if self.registry.exited(notice.incarnation, notice.cause, now()):
            self._ping(notice.incarnation)

    def take_heartbeat(self, beat: Heartbeat) -> None:
        incarnation = beat.record.incarnation
        before = self.registry.state_of(incarnation)
        seen = self.registry.observe(beat, now())
        self._rhythm.ride()
        if seen is None:
            return
        placer = self._placer_of(incarnation)
        if placer is not None and placer.heartbeat(beat, now()):
            self.mail.resync(beat.record)
        if seen is not Seen.ALIVE or beat.state != before:
            self.news.tell()
            record = beat.record
            log.info(
                "worker", name=record.name, role=record.role, model=record.model, state=beat.state, seen=seen.value
            )
        if seen is Seen.NEW:
            self._look_at(beat.record)
        if seen is Seen.RETURNED and (highest := self._fences.pop(incarnation, None)) is not None:
            # It was frozen, and its work has been placed elsewhere meanwhile.
            self.mail.fence(beat.record, highest)
        if beat.state == "wedged":
            self._lose(incarnation, "wedged", "wedged")
        rows = beat.sequences.get(self.mail_from(beat.record.role), ())
        result = audit(incarnation, rows, self.table.of_worker(incarnation))
        if result.resend or result.resend_prompts:
            self.mail.resend(incarnation, result.resend, result.resend_prompts, "heartbeat")
        for attempt in result.forgotten:
            attempt.conclude(Lost("forgotten"))
        for row in result.strangers:
            if row.state == "ended":
                self._dispatcher.acknowledge(incarnation, row.stream_id)
            elif (key := self.table.remembered(row.stream_id)) is not None:
                self.mail.cancel_forgotten(beat.record, *key)

    def _placer_of(self, incarnation: int) -> Placer | None:
        """That of the worker's model; None for a worker that no request goes to."""
        worker = self.registry.record_of(incarnation)
        return None if worker is None or self.registry.unserved(worker) else self.placers[worker.model]

    def _look_at(self, worker: WorkerRecord) -> None:
        """A new one: say once what an operator should know of it."""
        if (why := self.registry.unserved(worker)) is not None:
            log.warning("worker gets no request", worker=worker.name, role=worker.role, model=worker.model, why=why)
        for other, why in islice(self.registry.objections(worker).items(), MAX_OBJECTIONS_LOGGED):
            log.warning("workers don't pair", worker=worker.name, other=other, model=worker.model, why=why)

    # -- liveness --------------------------------------------------------------------------------------------

    async def _beat_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            moment = loop.time()
            self.registry.liveness.tick(moment)
            self._judge(moment)
            self.news.tell()
            for stream in self.attached:
                stream.keep_alive(moment, self.settings.sse_comment_interval)
            await self._publish_beat()
            await self._rhythm.turn()

    async def _publish_beat(self) -> None:
        self._beat = (self._beat + 1) & 0xFFFFFFFF
        name = self.settings.name
        beat = GatewayHeartbeat(self._beat, name, self.incarnation, self.subject, self._pid, self.table.live())
        subject = beat_subject(self.settings.cluster, "gateway", name, self.incarnation)
        try:
            await self._bus.publish(subject, self._codecs.beat.encode(beat))
        except BusError:
            return  # the next one is 250 ms away

    def _judge(self, moment: float) -> None:
        for incarnation in self.registry.liveness.verdicts(moment):
            placer = self._placer_of(incarnation)
            worker = self.registry.remove(incarnation)
            if worker is None:
                continue
            crashed = self.registry.has_crashed(incarnation)
            attempts = len(self.table.of_worker(incarnation))
            log.warning("worker gone", worker=worker.name, role=worker.role, crashed=crashed, attempts=attempts)
            self.metrics.workers_gone.inc()
            if placer is not None:
                placer.gone(worker)
            self._dispatcher.forget_worker(incarnation)
            self._fences[incarnation] = self._attempts
            if len(self._fences) > MAX_FENCES:
                del self._fences[next(iter(self._fences))]
            self.mail.fence(worker, self._attempts)
            self._lose(incarnation, "decode_gone", "prefill_gone", crashed=crashed)

    def _lose(self, incarnation: int, as_decode: LostReason, as_prefill: LostReason, *, crashed: bool = False) -> None:
        """Conclude the attempts that need this worker."""
        for attempt in self.table.of_worker(incarnation):
            if attempt.decode.incarnation == incarnation:
                attempt.conclude(Lost(as_decode, crashed))
            elif not attempt.running:
                attempt.conclude(Lost(as_prefill, crashed))

    def suspect(self, worker: WorkerRecord) -> None:
        """A connection to it failed, here or on the data plane: ping it."""
        if self.registry.liveness.suspect(worker.incarnation, now()):
            self._ping(worker.incarnation)

    def _ping(self, incarnation: int) -> None:
        if (worker := self.registry.record_of(incarnation)) is not None:
            self.tasks.spawn(self._ask_whether_alive(worker), "ping")

    async def _ask_whether_alive(self, worker: WorkerRecord) -> None:
        liveness = self.registry.liveness
        try:
            if await self.mail.ping(worker, self._beat):
                liveness.answered(worker.incarnation, now())
            # Its silence is an answer, too: the next tick judges.
        except NoResponders:
            liveness.refused(worker.incarnation)
            self._judge(now())

    def _bus_changed(self, connected: bool) -> None:
        if connected:
            self.registry.bus_up(now())
            self.news.tell()
        else:
            self.registry.liveness.bus_down(now())

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)
        if name in ("post", "beat"):
            self.failed.set()
