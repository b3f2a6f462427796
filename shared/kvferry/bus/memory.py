"""The bus inside one process: the same contract as over NATS, with faults on demand.

Time comes from the running loop and chance from an injected `Runtime`, so that on a virtual-time loop one seed
gives one history. Nothing here suspends: `call_soon` and `call_at` carry every delivery.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvferry.bus.base import BusSettings
from kvferry.bus.client import BusClient, BusSubscription
from kvferry.bus.inlet import MAX_PENDING_MESSAGES
from kvferry.bus.subject import matches
from kvferry.errors import BusUnavailable
from kvferry.runtime import Runtime

DEFAULT_MAX_PAYLOAD: Final = 8 << 20
MAX_SUBJECTS_KEPT: Final = 1024

# (subject, payload, reply, whether the server reports that nobody listens)
Deliver = Callable[[str, bytes, str, bool], None]


def everything(subject: str, payload: bytes) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Faults:
    """What befalls messages on their way. Probabilities are per delivery, delays in seconds.

    Delay alone keeps the order between one publisher and one subscription, as NATS does; a message held back
    (`reordering`) is overtaken by those sent within `hold` after it.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    min_delay: float = 0.0
    max_delay: float = 0.0
    hold: float = 0.05
    applies: Callable[[str, bytes], bool] = everything


@dataclass(slots=True)
class BrokerCounters:
    delivered: int = 0
    lost: int = 0
    duplicated: int = 0
    reordered: int = 0  # deliveries that a later message of the same path overtook


@dataclass(eq=False, slots=True)
class _Attachment:
    """One subscription of one connection."""

    pattern: str
    deliver: Deliver
    live: bool = True
    due: dict[int, float] = field(default_factory=dict)  # publisher -> when its last message arrives
    seen: dict[int, int] = field(default_factory=dict)  # publisher -> highest sequence number delivered


@dataclass(frozen=True, slots=True, order=True)
class _Flight:
    """One message on its way to one subscription. Ordered by arrival, then by sending."""

    due: float
    sequence: int
    publisher: int = field(compare=False)
    attachment: _Attachment = field(compare=False)
    subject: str = field(compare=False)
    payload: bytes = field(compare=False)
    reply: str = field(compare=False)
    no_responders: bool = field(compare=False)


class MemoryBroker:
    """Stands in for the NATS server. `faults` may be changed at any time."""

    def __init__(
        self, runtime: Runtime, *, max_payload: int = DEFAULT_MAX_PAYLOAD, faults: Faults | None = None
    ) -> None:
        self.max_payload = max_payload
        self.faults = faults or Faults()
        self.counters = BrokerCounters()
        self.running = True
        self._runtime = runtime
        self._clients: dict[MemoryBus, None] = {}  # connected ones, in order of connecting
        self._cut: set[MemoryBus] = set()
        self._attachments: dict[_Attachment, None] = {}
        self._hearers: dict[str, tuple[_Attachment, ...]] = {}  # by subject, as long as nobody comes or leaves
        self._flights: list[_Flight] = []
        self._sequence = 0
        self._timer: asyncio.Handle | None = None

    def stop(self) -> None:
        """The server is gone, and with it all that was on its way."""
        self.running = False
        for client in list(self._clients):
            self._sever(client)

    def restart(self) -> None:
        """The server is back. Each client reconnects when its own wait is over."""
        self.running = True

    def cut(self, client: MemoryBus) -> None:
        """Cut one client off, until `heal`."""
        self._cut.add(client)
        if client in self._clients:
            self._sever(client)

    def heal(self, client: MemoryBus) -> None:
        self._cut.discard(client)

    def admit(self, client: MemoryBus) -> bool:
        """Connect a client, if it can reach the server."""
        if not self.running or client in self._cut:
            return False
        self._clients[client] = None
        return True

    def leave(self, client: MemoryBus) -> None:
        self._clients.pop(client, None)

    def attach(self, pattern: str, deliver: Deliver) -> _Attachment:
        attachment = _Attachment(pattern, deliver)
        self._attachments[attachment] = None
        self._hearers.clear()
        return attachment

    def detach(self, attachment: _Attachment) -> None:
        attachment.live = False
        self._attachments.pop(attachment, None)
        self._hearers.clear()

    def send(self, publisher: int, subject: str, payload: bytes, reply: str) -> None:
        hearers = self._hearers_of(subject)
        for attachment in hearers:
            self._post(publisher, attachment, subject, payload, reply, no_responders=False)
        if reply and not hearers:
            for attachment in self._hearers_of(reply):
                self._post(publisher, attachment, reply, b"", "", no_responders=True)

    def _hearers_of(self, subject: str) -> tuple[_Attachment, ...]:
        found = self._hearers.get(subject)
        if found is None:
            if len(self._hearers) >= MAX_SUBJECTS_KEPT:  # each answer has a subject of its own
                self._hearers.clear()
            found = tuple(attachment for attachment in self._attachments if matches(attachment.pattern, subject))
            self._hearers[subject] = found
        return found

    def _sever(self, client: MemoryBus) -> None:
        self._clients.pop(client, None)
        client.severed()

    def _post(
        self, publisher: int, to: _Attachment, subject: str, payload: bytes, reply: str, *, no_responders: bool
    ) -> None:
        faults = self.faults
        copies = 1
        if faulty := faults.applies(subject, payload):
            if self._happens(faults.loss):
                self.counters.lost += 1
                return
            if self._happens(faults.duplication):
                self.counters.duplicated += 1
                copies = 2
        for _ in range(copies):
            due = asyncio.get_running_loop().time()
            if faulty and faults.max_delay > 0:
                due += faults.min_delay + (faults.max_delay - faults.min_delay) * self._runtime.uniform()
            due = max(due, to.due.get(publisher, 0.0))
            if faulty and self._happens(faults.reordering):
                due += faults.hold * self._runtime.uniform()
            else:
                to.due[publisher] = due
            self._sequence += 1
            flight = _Flight(due, self._sequence, publisher, to, subject, payload, reply, no_responders)
            heapq.heappush(self._flights, flight)
        self._schedule()

    def _happens(self, probability: float) -> bool:
        return probability > 0 and self._runtime.uniform() < probability

    def _schedule(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._flights:
            # The queue is ours because the loop's own timers of one instant have no defined order.
            loop = asyncio.get_running_loop()
            due = self._flights[0].due
            self._timer = loop.call_at(due, self._arrive) if due > loop.time() else loop.call_soon(self._arrive)

    def _arrive(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._flights and self._flights[0].due <= now:
            flight = heapq.heappop(self._flights)
            to = flight.attachment
            if not to.live:
                continue
            self.counters.delivered += 1
            highest = to.seen.get(flight.publisher, 0)
            if flight.sequence < highest:
                self.counters.reordered += 1
            to.seen[flight.publisher] = max(highest, flight.sequence)
            to.deliver(flight.subject, flight.payload, flight.reply, flight.no_responders)
        self._schedule()


class MemoryBus(BusClient):
    """One client of a `MemoryBroker`."""

    def __init__(
        self,
        broker: MemoryBroker,
        settings: BusSettings,
        runtime: Runtime,
        *,
        max_pending: int = MAX_PENDING_MESSAGES,
    ) -> None:
        super().__init__(settings, runtime, max_pending=max_pending)
        self._broker = broker
        self._id = runtime.random_u64()
        self._attached: dict[int, _Attachment] = {}
        self._answers_attached: _Attachment | None = None
        self._retry: asyncio.TimerHandle | None = None

    @property
    def max_payload(self) -> int:
        return self._broker.max_payload

    async def start(self) -> None:
        self._check_server(self._broker.max_payload)
        if not self._connect():
            raise BusUnavailable(f"no broker at {self._settings.url}: check KVFERRY_NATS_URL")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._connected = False
        if self._retry is not None:
            self._retry.cancel()
        self._broker.leave(self)
        self._detach_all()
        self._close_subscriptions()
        self._answers.fail_all("the bus is closed")

    def severed(self) -> None:
        """The broker says that the connection is lost."""
        self._detach_all()
        self._set_connected(False)
        self._retry_later()

    def _connect(self) -> bool:
        if not self._broker.admit(self):
            return False
        self._answers_attached = self._broker.attach(self._answers.pattern, self._answer_arrived)
        for subscription in self._subscriptions.values():
            self._attach_now(subscription)
        self._set_connected(True)
        return True

    def _retry_later(self) -> None:
        self._retry = asyncio.get_running_loop().call_later(self._reconnect_wait(), self._reconnect)

    def _reconnect(self) -> None:
        self._retry = None
        if self._closed:
            return
        if self._broker.max_payload >= self._settings.min_payload and self._connect():
            self.counters.reconnects += 1
        else:
            self._retry_later()

    def _attach_now(self, subscription: BusSubscription) -> None:
        def deliver(subject: str, payload: bytes, reply: str, no_responders: bool) -> None:
            subscription.deliver(subject, payload, reply)

        self._attached[subscription.subscription_id] = self._broker.attach(subscription.pattern, deliver)

    def _detach_all(self) -> None:
        for attachment in self._attached.values():
            self._broker.detach(attachment)
        self._attached.clear()
        if self._answers_attached is not None:
            self._broker.detach(self._answers_attached)
            self._answers_attached = None

    async def _attach(self, subscription: BusSubscription) -> None:
        self._attach_now(subscription)

    async def _detach(self, subscription: BusSubscription) -> None:
        attachment = self._attached.pop(subscription.subscription_id, None)
        if attachment is not None:
            self._broker.detach(attachment)

    async def _send(self, subject: str, payload: bytes, reply: str) -> None:
        self._broker.send(self._id, subject, payload, reply)

    def _answer_arrived(self, subject: str, payload: bytes, reply: str, no_responders: bool) -> None:
        self._answers.arrived(subject, payload, no_responders=no_responders)
