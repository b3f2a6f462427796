"""What workers and supervisors say to this gateway: decoded, and sure to be from whom it claims to be.

A message that is wrong in any way is counted and dropped; nobody else sees it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from kvferry.bus.base import Bus, BusMessage, Subscription
from kvferry.errors import WireError
from kvferry.log import get_logger
from kvferry.wire.beats import ExitNotice, Heartbeat
from kvferry.wire.fields import WORKER_ROLES
from kvferry.wire.messages import CacheNews, Codecs
from kvferry.wire.record import WorkerRecord
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
from kvferry.wire.tokens import TokenBatch
from kvferry_gateway.fleet.registry import Registry
from kvferry_gateway.metrics import GatewayMetrics

log = get_logger(__name__)


class Reader(ABC):
    """Whom the messages are for."""

    @abstractmethod
    def take_batch(self, batch: TokenBatch) -> None:
        """From a worker that is known. Raises `WireError`."""

    @abstractmethod
    def take_heartbeat(self, beat: Heartbeat) -> None:
        """From a worker, known or new."""

    @abstractmethod
    def take_exit(self, notice: ExitNotice) -> None:
        """From whoever saw a process end."""

    @abstractmethod
    def take_cache_news(self, news: CacheNews) -> None:
        """From a worker that is known. Raises `WireError`."""


class Inbox:
    """The subscriptions of one gateway. Messages come only between `open` and `close`."""

    def __init__(
        self, bus: Bus, cluster: str, subject: str, registry: Registry, metrics: GatewayMetrics, reader: Reader
    ) -> None:
        """`subject`: this gateway's own."""
        self._bus = bus
        self._cluster = cluster
        self._subject = subject
        self._registry = registry
        self._metrics = metrics
        self._reader = reader
        self._codecs = Codecs()
        self._subscriptions: list[Subscription] = []

    async def open(self) -> None:
        """Raises `BusUnavailable`."""
        handlers = {
            all_mail(self._subject): self._on_batch,
            **{role_beats(self._cluster, role): self._on_beat for role in WORKER_ROLES},
            all_exits(self._cluster): self._on_exit,
            all_cache_news(self._cluster): self._on_cache_news,
        }
        for subject, handler in handlers.items():
            self._subscriptions.append(await self._bus.subscribe(subject, handler))

    async def close(self) -> None:
        for subscription in self._subscriptions:
            await subscription.close()

    def mail_from(self, role: str) -> str:
        """Where workers of a role write to this gateway."""
        return mail_subject(self._subject, role)

    def _on_batch(self, message: BusMessage) -> None:
        try:
            batch = self._codecs.to_gateway.decode(message.payload)
            # Of one that is gone the attempts are over, and are told to it when it returns.
            if (worker := self._registry.record_of(batch.incarnation)) is not None:
                check_origin(message.subject, self.mail_from(worker.role))
                self._reader.take_batch(batch)
        except WireError as error:
            self._count(error)
            log.warning("message dropped", kind=error.kind, bytes=len(message.payload))

    def _on_beat(self, message: BusMessage) -> None:
        try:
            beat = self._codecs.beat.decode(message.payload)
            if isinstance(beat, Heartbeat):
                self._check_record(message.subject, beat.record)
                self._reader.take_heartbeat(beat)
        except WireError as error:
            self._count(error)

    def _check_record(self, subject: str, record: WorkerRecord) -> None:
        """Raises `Impostor` for a worker that speaks for another one, or wants to be written to in another's place."""
        named = self._cluster, record.role, record.name, record.incarnation
        check_origin(subject, beat_subject(*named))
        process = process_subject(*named)
        check_origin(record.subject, mail_subject(process, "gateway"), process)  # a worker of an older version
        known = self._registry.record_of(record.incarnation)
        if known is not None:
            check_origin(record.subject, known.subject)

    def _on_exit(self, message: BusMessage) -> None:
        try:
            notice = self._codecs.beat.decode(message.payload)
            if isinstance(notice, ExitNotice):
                self._reader.take_exit(notice)
        except WireError as error:
            self._count(error)

    def _on_cache_news(self, message: BusMessage) -> None:
        try:
            news = self._codecs.cache.decode(message.payload)
            # The first heartbeat of one that is new will show what it told before.
            if (worker := self._registry.record_of(news.incarnation)) is not None:
                named = self._cluster, worker.role, worker.name, worker.incarnation
                check_origin(message.subject, cache_subject(*named))
                self._reader.take_cache_news(news)
        except WireError as error:
            self._count(error)

    def _count(self, error: WireError) -> None:
        self._metrics.wire_errors.labels("bus", error.kind).inc()
