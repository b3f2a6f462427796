"""What this gateway says to workers: requests, which they answer, and mail, which they don't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from kvferry.bus.base import Bus
from kvferry.bus.liveness import PING_TIMEOUT
from kvferry.errors import BusError, BusTimeout, BusUnavailable, NoResponders, WireError
from kvferry.log import get_logger
from kvferry.wire.messages import Codecs, ToWorker
from kvferry.wire.orders import CacheResync, Cancel, Drain, EndAck, Fence, Ping, Pong, Resend
from kvferry.wire.record import WorkerRecord
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected
from kvferry_gateway.fleet.post import Post
from kvferry_gateway.fleet.registry import Registry
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.streams.attempt import Attempt
from kvferry_gateway.streams.dispatcher import WorkerMail

ASKS: Final = 2  # how often a worker is asked before its silence counts

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Unreachable:
    """A worker gave no answer. `bus_down`: because nothing could be asked; `unsendable`: not this, and not later."""

    bus_down: bool = False
    unsendable: bool = False


Reply = Accepted | Rejected | Unreachable


class Mail(WorkerMail):
    """Mail to a worker that the registry doesn't know is not written."""

    def __init__(self, bus: Bus, incarnation: int, registry: Registry, metrics: GatewayMetrics) -> None:
        """`incarnation`: this gateway's."""
        self.post: Final = Post(bus, metrics.bus_drops.inc)
        self._bus = bus
        self._incarnation = incarnation
        self._registry = registry
        self._metrics = metrics
        self._codecs = Codecs()

    async def ask(self, worker: WorkerRecord, request: PrefillRequest | DecodeRequest, timeout: float) -> Reply | None:
        """Offer a request; twice if it keeps silent for `timeout` seconds, then None. Never raises."""
        payload = self._codecs.to_worker.encode(request)
        for _ in range(ASKS):
            try:
                answer = await self._bus.request(worker.subject, payload, timeout)
                reply = self._codecs.answer.decode(answer)
            except BusTimeout:
                continue
            except NoResponders:
                break
            except WireError as error:
                self._metrics.wire_errors.labels("bus", error.kind).inc()
                continue
            except BusUnavailable:
                return Unreachable(bus_down=True)
            except BusError as error:
                log.error("request not sent", worker=worker.name, problem=str(error))
                return Unreachable(unsendable=True)
            if isinstance(reply, (Accepted, Rejected)):
                return reply
        return None

    async def ping(self, worker: WorkerRecord, nonce: int) -> bool:
        """Whether it answered. Raises `NoResponders`: nobody is there."""
        try:
            answer = await self._bus.request(worker.subject, self._codecs.to_worker.encode(Ping(nonce)), PING_TIMEOUT)
            pong = self._codecs.answer.decode(answer)
        except NoResponders:
            raise
        except (BusError, WireError):
            return False
        return isinstance(pong, Pong) and pong.incarnation == worker.incarnation

    def cancel(self, worker: WorkerRecord, attempt: Attempt) -> None:
        self._send(worker.subject, Cancel(attempt.ticket, attempt.number))
        self._metrics.cancels.inc()

    def cancel_forgotten(self, worker: WorkerRecord, ticket: bytes, attempt: int) -> None:
        """An attempt that was cancelled, and lives on there."""
        self._send(worker.subject, Cancel(ticket, attempt))

    def fence(self, worker: WorkerRecord, highest_attempt: int) -> None:
        self._send(worker.subject, Fence(worker.incarnation, self._incarnation, highest_attempt))

    def drain(self, incarnation: int) -> WorkerRecord | None:
        """Tell a worker to take no more and to end. None: there is no such worker."""
        worker = self._registry.record_of(incarnation)
        if worker is not None:
            self._send(worker.subject, Drain(incarnation))
        return worker

    def resync(self, worker: WorkerRecord) -> None:
        """Ask for all that its cache holds."""
        self._send(worker.subject, CacheResync(worker.incarnation))

    def acknowledge(self, incarnation: int, stream_ids: tuple[int, ...], scored: tuple[int, ...]) -> None:
        if (worker := self._registry.record_of(incarnation)) is not None:
            self._send(worker.subject, EndAck(self._incarnation, stream_ids, scored))

    def resend(
        self, incarnation: int, streams: tuple[tuple[int, int], ...], prompts: tuple[tuple[int, int], ...], cause: str
    ) -> None:
        if (worker := self._registry.record_of(incarnation)) is not None:
            self._metrics.resends.labels(cause).inc()
            self._send(worker.subject, Resend(self._incarnation, streams, prompts))

    def _send(self, subject: str, message: ToWorker) -> None:
        self.post.send(subject, self._codecs.to_worker.encode(message))
