"""What a worker hears on the bus: requests, cancels, fences, gateways' heartbeats; and its answers to them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from kvferry.bus.base import BusMessage, Subscription
from kvferry.bus.liveness import Liveness
from kvferry.errors import BusError, Impostor, WireError
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.schedule.sequence import Sequence
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.codec import WIRE_VERSION
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import CacheResync, Cancel, Drain, EndAck, Fence, Ping, Pong, Resend
from kvferry.wire.subjects import all_mail, beat_subject, check_origin, role_beats, sender_of
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry.worker.admission import refuse, retry_after
from kvferry.worker.gateways import Gateways

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker

log = get_logger(__name__)
ANYBODYS: Final = (Ping, Drain)  # what operators may say, too


class Inbox:
    """Turns messages into calls of its worker. Only the event loop calls it."""

    def __init__(self, worker: Worker[Any]) -> None:
        self._worker = worker
        self._codecs = Codecs()
        self._subscriptions: list[Subscription] = []
        self._sequence_ids = 0
        self._gateways = Gateways(worker.incarnation, Liveness(now()))
        self._bus_lost: float | None = None

    async def open(self) -> None:
        """Begin to listen."""
        worker = self._worker
        worker.bus.on_change(self._bus_changed)
        beats = role_beats(worker.settings.cluster, "gateway")
        self._subscriptions.append(await worker.bus.subscribe(all_mail(worker.process), self._on_message))
        self._subscriptions.append(await worker.bus.subscribe(beats, self._on_gateway_beat))

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()

    # -- requests --------------------------------------------------------------------------------------------

    def _on_message(self, message: BusMessage) -> None:
        worker = self._worker
        try:
            request = self._codecs.to_worker.decode(message.payload)
            if not isinstance(request, ANYBODYS) and (sender := sender_of(message.subject)) != "gateway":
                raise Impostor(f"{type(request).__name__} from a process of the role {sender!r}")
        except WireError as error:
            worker.metrics.wire_errors.labels("bus", error.kind).inc()
            log.warning("message dropped", kind=error.kind, bytes=len(message.payload), version=WIRE_VERSION)
            return
        match request:
            case PrefillRequest() | DecodeRequest():
                self._answer(message, self._on_request(request))
            case Cancel(ticket, attempt):
                if not worker.cancel((ticket, attempt)):
                    worker.fences.bury((ticket, attempt), now())
            case Fence(incarnation, gateway, highest) if incarnation == worker.incarnation:
                worker.fences.fence(gateway, highest)
                self._give_up(work for work in self._works_of(gateway) if work.attempt <= highest)
            case Resend(gateway, streams, prompts):
                worker.outbox.resend(gateway, streams, prompts)
                worker.post.wake()
            case EndAck(gateway, streams, scored):
                worker.outbox.acknowledge(gateway, streams, scored)
            case Ping(nonce):
                self._answer(message, Pong(nonce, worker.incarnation))
            case Drain(incarnation) if incarnation == worker.incarnation:
                worker.draining.set()
            case CacheResync(incarnation) if incarnation == worker.incarnation:
                worker.cache_news.ask()

    def _answer(self, message: BusMessage, answer: Accepted | Rejected | Pong) -> None:
        self._worker.tasks.spawn(self._respond(message, self._codecs.answer.encode(answer)), "respond")

    async def _respond(self, message: BusMessage, payload: bytes) -> None:
        try:
            await message.respond(payload)
        except BusError:
            return  # the gateway asks again: answers are idempotent

    def _on_request(self, request: PrefillRequest | DecodeRequest) -> Accepted | Rejected:
        worker, work = self._worker, request.work
        if worker.fences.is_repeat(work):
            return Accepted(work.ticket, work.attempt)
        reason = refuse(request, worker.role, worker.state, worker.model_name, worker.runner)
        reason = reason or worker.fences.check(work)
        if reason is None:
            self._gateways.seen(work.gateway_incarnation, now())  # its silence will free what is kept for it
            worker.outbox.open(work)
            sequence = self._sequence(work)
            reason = worker.accept(request, sequence)
            if reason == "queue_full" and worker.displace(sequence):
                reason = worker.accept(request, sequence)
            if reason is not None:
                worker.outbox.close(work)
        if reason is not None:
            return Rejected(work.ticket, work.attempt, reason, retry_after(worker.scheduler))
        older = worker.fences.accept(work)
        if older is not None:
            worker.cancel(older)
        worker.grammars.accepted(sequence)
        worker.traces.accepted(sequence)
        worker.wake()
        return Accepted(work.ticket, work.attempt)

    def _sequence(self, work: Work) -> Sequence:
        self._sequence_ids += 1
        runner = self._worker.runner
        kv_format = runner.kv_format
        return Sequence(
            self._sequence_ids, work, kv_format.format_id, kv_format.block_size, runner.max_model_len, now(),
            runner.eos_token_ids,
        )  # fmt: skip

    # -- gateways --------------------------------------------------------------------------------------------

    def tick(self, moment: float) -> None:
        """Every heartbeat: judge the gateways, and whether the bus has been away for too long."""
        worker = self._worker
        self._gateways.liveness.tick(moment)
        for incarnation in self._gateways.gone(moment):
            works = self._sequences_of(incarnation)
            log.warning("gateway gone", incarnation=f"{incarnation:016x}", sequences=len(works))
            for work in works:
                worker.cancel(work.key)
            worker.outbox.forget_gateway(incarnation)
        if self._bus_lost is not None and moment - self._bus_lost >= worker.settings.bus_grace:
            for key in list(worker.scheduler.sequences):
                worker.cancel(key)

    def _on_gateway_beat(self, message: BusMessage) -> None:
        try:
            beat = self._codecs.beat.decode(message.payload)
            if not isinstance(beat, GatewayHeartbeat):
                return
            cluster = self._worker.settings.cluster
            check_origin(message.subject, beat_subject(cluster, "gateway", beat.name, beat.incarnation))
        except WireError as error:
            self._worker.metrics.wire_errors.labels("bus", error.kind).inc()
            return
        self._give_up(self._gateways.observe(beat, self._works_of(beat.incarnation), now()))

    def _bus_changed(self, connected: bool) -> None:
        liveness = self._gateways.liveness
        if connected:
            liveness.bus_up(now())
            self._bus_lost = None
            self._worker.post.wake()
        else:
            liveness.bus_down(now())
            self._bus_lost = now()

    def _give_up(self, works: Iterable[Work]) -> None:
        """What a gateway no longer wants: cancelled where it still lives, forgotten where its end waits."""
        for work in works:
            if not self._worker.cancel(work.key):
                self._worker.outbox.close(work)

    def _works_of(self, gateway_incarnation: int) -> list[Work]:
        """A gateway's live attempts, and those whose end it has not confirmed."""
        return self._sequences_of(gateway_incarnation) + self._worker.outbox.ended(gateway_incarnation)

    def _sequences_of(self, gateway_incarnation: int) -> list[Work]:
        sequences = self._worker.scheduler.sequences.values()
        return [s.work for s in sequences if s.work.gateway_incarnation == gateway_incarnation]
