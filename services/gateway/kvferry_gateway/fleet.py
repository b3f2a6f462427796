"""The workers as this gateway reaches them: the only part of it that talks to the bus.

In: token batches, heartbeats, exit notices. Out: requests, cancels, acknowledgements, and every
`BEAT_INTERVAL` the gateway's own heartbeat.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

from kvferry.bus.base import Bus, BusMessage, Subscription
from kvferry.bus.liveness import BEAT_INTERVAL, PING_TIMEOUT, Seen
from kvferry.errors import BusError, BusTimeout, BusUnavailable, NoResponders, WireError
from kvferry.log import get_logger
from kvferry.runtime import Runtime, TaskSet, now
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
from kvferry.wire.subjects import all_cache_news, beat_subject, process_subject, role_beats
from kvferry_gateway.attempt import Attempt, AttemptTable, Lost, LostReason, audit
from kvferry_gateway.dispatcher import Dispatcher, WorkerMail
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.placer import Placer
from kvferry_gateway.post import Post
from kvferry_gateway.registry import Registry
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.streams import TokenStream
from kvferry_gateway.targets import Targets
from kvferry_gateway.timeline import Timelines

ASKS: Final = 2  # how often a worker is asked before its silence counts
MAX_FENCES: Final = 4096  # workers that are gone and may come back

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A worker gave no answer. `bus_down`: because nothing could be asked."""

    bus_down: bool = False


Reply = Accepted | Rejected | Unreachable


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request that lost its workers and finds no new ones."""

    request_id: str
    since: float
    why: str


class Fleet(WorkerMail):
    """Registry, attempts and dispatcher of one gateway, and the bus around them."""

    def __init__(
        self, settings: GatewaySettings, runtime: Runtime, bus: Bus, metrics: GatewayMetrics, pid: int, targets: Targets
    ) -> None:
        self.settings = settings
        self.runtime = runtime
        self.metrics = metrics
        self.incarnation = runtime.random_u64()
        self.subject = process_subject(settings.cluster, "gateway", settings.name, self.incarnation)
        self.registry = Registry(now())
        self.placer = Placer(targets, settings.local_prefill_threshold)
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
        self._news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._subscriptions: list[Subscription] = []

    # -- life cycle ------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Raises `BusUnavailable`."""
        self._bus.on_change(self._bus_changed)
        self._subscriptions.append(await self._bus.subscribe(self.subject, self._on_batch))
        for role in WORKER_ROLES:
            beats = role_beats(self.settings.cluster, role)
            self._subscriptions.append(await self._bus.subscribe(beats, self._on_beat))
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

    # -- requests --------------------------------------------------------------------------------------------

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

    async def wait_for_news(self, stop: asyncio.Future[Exception], timeout: float) -> None:
        """Until a worker has come or changed its state, `stop` is done, or `timeout` seconds have passed."""
        waits: tuple[asyncio.Future[Any], ...] = (self._news, stop)
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)

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

    def acknowledge(self, incarnation: int, stream_ids: tuple[int, ...]) -> None:
        if (worker := self.registry.record_of(incarnation)) is not None:
            self._send(worker.subject, EndAck(self.incarnation, stream_ids))

    def resend(self, incarnation: int, streams: tuple[tuple[int, int], ...], cause: str) -> None:
        if (worker := self.registry.record_of(incarnation)) is not None:
            self.metrics.resends.labels(cause).inc()
            self._send(worker.subject, Resend(self.incarnation, streams))

    def _send(self, subject: str, message: ToWorker) -> None:
        self._post.send(subject, self._codecs.to_worker.encode(message))

    # -- messages from workers -------------------------------------------------------------------------------

    def _on_batch(self, message: BusMessage) -> None:
        try:
            self._dispatcher.take(self._codecs.to_gateway.decode(message.payload))
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            log.warning("message dropped", kind=error.kind, bytes=len(message.payload))

    def _on_beat(self, message: BusMessage) -> None:
        try:
            beat = self._codecs.beat.decode(message.payload)
        except WireError as error:
            self.metrics.wire_errors.labels("bus", error.kind).inc()
            return
        match beat:
            case Heartbeat():
                self._on_heartbeat(beat)
            case ExitNotice(incarnation, cause):
                if self.registry.exited(incarnation, cause, now()):
                    self._ping(incarnation)

    def _on_heartbeat(self, beat: Heartbeat) -> None:
        incarnation = beat.record.incarnation
        before = self.registry.state_of(incarnation)
        seen = self.registry.observe(beat, now())
        if seen is None:
            return
        if self.placer.heartbeat(beat, now()):
            self._send(beat.record.subject, CacheResync(incarnation))
        if seen is not Seen.ALIVE or beat.state != before:
            self._tell_news()
            log.info("worker", name=beat.record.name, role=beat.record.role, state=beat.state, seen=seen.value)
        if seen is Seen.RETURNED and (highest := self._fences.pop(incarnation, None)) is not None:
            # It was frozen, and its work has been placed elsewhere meanwhile.
            self._send(beat.record.subject, Fence(incarnation, self.incarnation, highest))
        if beat.state == "wedged":
            self._lose(incarnation, "wedged", "wedged")
        result = audit(incarnation, beat.sequences.get(self.subject, ()), self.table.of_worker(incarnation))
        if result.resend:
            self.resend(incarnation, result.resend, "heartbeat")
        for attempt in result.forgotten:
            attempt.conclude(Lost("forgotten"))
        for row in result.strangers:
            if row.state == "ended":
                self._dispatcher.acknowledge(incarnation, row.stream_id)
            elif (key := self.table.remembered(row.stream_id)) is not None:
                self._send(beat.record.subject, Cancel(*key))

    def _on_cache_news(self, message: BusMessage) -> None:
        try:
            self.placer.hear(self._codecs.cache.decode(message.payload))
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
            worker = self.registry.remove(incarnation)
            if worker is None:
                continue
            crashed = self.registry.has_crashed(incarnation)
            attempts = len(self.table.of_worker(incarnation))
            log.warning("worker gone", worker=worker.name, role=worker.role, crashed=crashed, attempts=attempts)
            self.metrics.workers_gone.inc()
            self.placer.gone(worker)
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
        self._news.set_result(None)
        self._news = asyncio.get_running_loop().create_future()

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("task failed", task=name, exc_info=error)
        if name in ("post", "beat"):
            self.failed.set()
