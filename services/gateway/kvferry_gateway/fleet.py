"""The workers as this gateway reaches them: the only part of it that talks to the bus.

In: token batches, heartbeats, exit notices. Out: requests, cancels, acknowledgements, and every
`BEAT_INTERVAL` the gateway's own heartbeat.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from kvferry.bus.base import Bus, BusMessage, Subscription
from kvferry.bus.liveness import BEAT_INTERVAL, PING_TIMEOUT, Seen
from kvferry.errors import BusError, BusTimeout, BusUnavailable, NoResponders, WireError
from kvferry.log import get_logger
from kvferry.runtime import Runtime, TaskSet, now
from kvferry.trace.span import SpanExporter
from kvferry.trace.tracer import Tracer
from kvferry.wire.messages import (
    WORKER_ROLES,
    Accepted,
    CacheResync,
    Cancel,
    Codecs,
    DecodeRequest,
    Drain,
    EndAck,
    ExitNotice,
    Fence,
    GatewayHeartbeat,
    Heartbeat,
    Ping,
    Pong,
    PrefillRequest,
    Rejected,
    Resend,
    ToWorker,
    WorkerRecord,
)
from kvferry.wire.subjects import (
    all_cache_news,
    all_exits,
    all_mail,
    beat_subject,
    cache_subject,
    check_origin,
    mail_subject,
    process_subject,
    role_beats,
)
from kvferry_gateway.attempt import Attempt, AttemptTable, Lost, LostReason, audit
from kvferry_gateway.dispatcher import Dispatcher, WorkerMail
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.models import ServedModel
from kvferry_gateway.placer import Placer
from kvferry_gateway.post import Post
from kvferry_gateway.registry import Registry
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.streams import TokenStream
from kvferry_gateway.targets import Targets
from kvferry_gateway.timeline import Timelines

ASKS: Final = 2  # how often a worker is asked before its silence counts
MAX_FENCES: Final = 4096  # workers that are gone and may come back
MAX_OBJECTIONS_LOGGED: Final = 4  # of one new worker; /v1/cluster has them all

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A worker gave no answer. `bus_down`: because nothing could be asked."""

    bus_down: bool = False


Reply = Accepted | Rejected | Unreachable


Order = tuple[int, float, int]  # priority, arrival, number of a unit: who is placed before whom


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that lost its workers and finds no new ones."""

    request_id: str
    model: str
    since: float
    why: str


class Fleet(WorkerMail):
    """Registry, attempts and dispatcher of one gateway, and the bus around them."""

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
        self._bus = bus
        self._dispatcher = Dispatcher(self.table, self, metrics)
        self._post = Post(bus, metrics.bus_drops.inc)
        self._codecs = Codecs()
        self._pid = pid
        self._attempts = 0
        self._beat = 0
        self._fences: dict[int, int] = {}  # incarnation that is gone -> highest attempt it may have
        self._sleepers: dict[Order, asyncio.Future[None]] = {}
        self._subscriptions: list[Subscription] = []

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `BusUnavailable`."""
        self._bus.on_change(self._bus_changed)
        self._subscriptions.append(await self._bus.subscribe(all_mail(self.subject), self._on_batch))
        for role in WORKER_ROLES:
            beats = role_beats(self.settings.cluster, role)
            self._subscriptions.append(await self._bus.subscribe(beats, self._on_beat))
        exits = all_exits(self.settings.cluster)
        self._subscriptions.append(await self._bus.subscribe(exits, self._on_exit))
        news = all_cache_news(self.settings.cluster)
        self._subscriptions.append(await self._bus.subscribe(news, self._on_cache_news))
        self.tasks.spawn(self._post.run(), "post")
        self.tasks.spawn(self._beat_loop(), "beat")

    async def stop(self) -> None:
        """What was posted is published first. The bus is left open."""
        if self._bus.connected:
            await self._post.flushed()
        await self.tasks.cancel()
        for subscription in self._subscriptions:
            await subscription.close()
        if self.tracer is not None:
            await self.tracer.close()

    # -- requests --------------------------------------------------------------------------------------------

    def mail_from(self, role: str) -> str:
        """Where workers of a role write to this gateway."""
        return mail_subject(self.subject, role)

    def new_attempt_number(self) -> int:
        self._attempts += 1
        return self._attempts

    async def ask(self, worker: WorkerRecord, request: PrefillRequest | DecodeRequest) -> Reply:
        """Offer a request to a worker; twice if it keeps silent. Never raises."""
        payload = self._codecs.to_worker.encode(request)
        for _ in range(ASKS):
            try:
                answer = await self._bus.request(worker.subject, payload, self.settings.accept_timeout)
                reply = self._codecs.answer.decode(answer)
            except BusTimeout:
                continue
            except NoResponders:
                break
            except WireError as error:
                self.metrics.wire_errors.labels("bus", error.kind).inc()
                continue
            except BusUnavailable:
                return Unreachable(bus_down=True)
            except BusError as error:
                log.error("request not sent", worker=worker.name, problem=str(error))
                return Unreachable()
            if isinstance(reply, (Accepted, Rejected)):
                return reply
        self.suspect(worker)
        return Unreachable()

    async def wait_for_news(self, order: Order, stop: asyncio.Future[Exception]) -> None:
        """Until a worker has come or changed its state, a heartbeat has passed, or `stop` is done.

        All who wait are woken in their order, so that the urgent and the old are placed before the others.
        """
        news = self._sleepers[order] = asyncio.get_running_loop().create_future()
        try:
            waits: tuple[asyncio.Future[Any], ...] = (news, stop)
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._sleepers[order]

    def cancel(self, worker: WorkerRecord, attempt: Attempt) -> None:
        self._send(worker.subject, Cancel(attempt.ticket, attempt.number))
        self.metrics.cancels.inc()

    def drain(self, incarnation: int) -> WorkerRecord | None:
        """Tell a worker to take no more and to end. None: there is no such worker."""
        worker = self.registry.record_of(incarnation)
        if worker is not None:
            self._send(worker.subject, Drain(incarnation))
        return worker

    def confirm_end(self, attempt: Attempt) -> None:
        """Its end has done its work."""
        if attempt.end is not None:
            self._dispatcher.acknowledge(attempt.end_from, attempt.stream_id)

    def acknowledge(self, incarnation: int, stream_ids: tuple[int, ...], scored: tuple[int, ...]) -> None:
        if (worker := self.registry.record_of(incarnation)) is not None:
            self._send(worker.subject, EndAck(self.incarnation, stream_ids, scored))

    def resend(
        self, incarnation: int, streams: tuple[tuple[int, int], ...], prompts: tuple[tuple[int, int], ...], cause: str
    ) -> None:
        if (worker := self.registry.record_of(incarnation)) is not None:
            self.metrics.resends.labels(cause).inc()
            self._send(worker.subject, Resend(self.incarnation, streams, prompts))

    def _send(self, subject: str, message: ToWorker) -> None:
        self._post.send(subject, self._codecs.to_worker.encode(message))

    # -- messages from workers -------------------------------------------------------------------------------

    def _on_batch(self, message: BusMessage) -> None:
        try:
            batch = self._codecs.to_gateway.decode(message.payload)
            worker = self.registry.record_of(batch.incarnation)
            if worker is None:
                return  # gone: its attempts are over, and are told to it when it returns
            check_origin(message.subject, self.mail_from(worker.role))
            self._dispatcher.take(batch)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            log.warning("message dropped", kind=error.kind, bytes=len(message.payload))

    def _on_beat(self, message: BusMessage) -> None:
        try:
            beat = self._codecs.beat.decode(message.payload)
            if isinstance(beat, Heartbeat):
                self._check_record(message.subject, beat.record)
                self._on_heartbeat(beat)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()

    def _check_record(self, subject: str, record: WorkerRecord) -> None:
        """Raises `Impostor` for a worker that speaks for another one, or wants to be written to in another's place."""
        named = self.settings.cluster, record.role, record.name, record.incarnation
        check_origin(subject, beat_subject(*named))
        process = process_subject(*named)
        check_origin(record.subject, mail_subject(process, "gateway"), process)  # a worker of an older version
        known = self.registry.record_of(record.incarnation)
        if known is not None:
            check_origin(record.subject, known.subject)

    def _on_exit(self, message: BusMessage) -> None:
        try:
            notice = self._codecs.beat.decode(message.payload)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            return
        if isinstance(notice, ExitNotice) and self.registry.exited(notice.incarnation, notice.cause, now()):
            self._ping(notice.incarnation)

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        incarnation = beat.record.incarnation
        before = self.registry.state_of(incarnation)
        seen = self.registry.observe(beat, now())
        if seen is None:
            return
        placer = self._placer_of(incarnation)
        if placer is not None and placer.heartbeat(beat, now()):
            self._send(beat.record.subject, CacheResync(incarnation))
        if seen is not Seen.ALIVE or beat.state != before:
            self._tell_news()
            record = beat.record
            log.info(
                "worker", name=record.name, role=record.role, model=record.model, state=beat.state, seen=seen.value
            )
        if seen is Seen.NEW:
            self._look_at(beat.record)
        if seen is Seen.RETURNED and (highest := self._fences.pop(incarnation, None)) is not None:
            # It was frozen, and its work has been placed elsewhere meanwhile.
            self._send(beat.record.subject, Fence(incarnation, self.incarnation, highest))
        if beat.state == "wedged":
            self._lose(incarnation, "wedged", "wedged")
        rows = beat.sequences.get(self.mail_from(beat.record.role), ())
        result = audit(incarnation, rows, self.table.of_worker(incarnation))
        if result.resend or result.resend_prompts:
            self.resend(incarnation, result.resend, result.resend_prompts, "heartbeat")
        for attempt in result.forgotten:
            attempt.conclude(Lost("forgotten"))
        for row in result.strangers:
            if row.state == "ended":
                self._dispatcher.acknowledge(incarnation, row.stream_id)
            elif (key := self.table.remembered(row.stream_id)) is not None:
                self._send(beat.record.subject, Cancel(*key))

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

    def _on_cache_news(self, message: BusMessage) -> None:
        try:
            news = self._codecs.cache.decode(message.payload)
            worker = self.registry.record_of(news.incarnation)
            if worker is None:
                return  # its first heartbeat will show what is missing
            cluster = self.settings.cluster
            check_origin(message.subject, cache_subject(cluster, worker.role, worker.name, worker.incarnation))
            if (placer := self._placer_of(news.incarnation)) is not None:
                placer.hear(news)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()

    # -- liveness --------------------------------------------------------------------------------------------

    async def _beat_loop(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time()
        while True:
            moment = loop.time()
            self.registry.liveness.tick(moment)
            self._judge(moment)
            self._tell_news()
            for stream in self.attached:
                stream.keep_alive(moment, self.settings.sse_comment_interval)
            await self._publish_beat()
            due = max(due + BEAT_INTERVAL, loop.time())
            await asyncio.sleep(due - loop.time())

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
            self._send(worker.subject, Fence(incarnation, self.incarnation, self._attempts))
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
        payload = self._codecs.to_worker.encode(Ping(self._beat))
        try:
            answer = self._codecs.answer.decode(await self._bus.request(worker.subject, payload, PING_TIMEOUT))
        except NoResponders:
            liveness.refused(worker.incarnation)
            self._judge(now())
        except (BusError, WireError):
            return  # its silence is the answer: the next tick judges
        else:
            if isinstance(answer, Pong) and answer.incarnation == worker.incarnation:
                liveness.answered(worker.incarnation, now())

    def _bus_changed(self, connected: bool) -> None:
        if connected:
            self.registry.liveness.bus_up(now())
            self._tell_news()
        else:
            self.registry.liveness.bus_down(now())

    def _tell_news(self) -> None:
        for _, sleeper in sorted(self._sleepers.items()):
            if not sleeper.done():
                sleeper.set_result(None)

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)
        if name in ("post", "beat"):
            self.failed.set()
