"""What the NATS bus and its in-memory twin have in common: checks, subscriptions, requests, state."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Final

import structlog

from kvferry.bus.answers import Answers, NobodyListens
from kvferry.bus.base import (
    Bus,
    BusCounters,
    BusMessage,
    BusSettings,
    Handler,
    PayloadTooLarge,
    Subscription,
)
from kvferry.bus.inlet import MAX_PENDING_MESSAGES, Inlet
from kvferry.bus.subject import check_pattern, check_subject
from kvferry.errors import BusTimeout, BusUnavailable, NoResponders, SettingError
from kvferry.runtime import Runtime

MIN_RECONNECT_WAIT: Final = 0.1  # seconds
MAX_RECONNECT_WAIT: Final = 1.0


class ReceivedMessage(BusMessage):
    __slots__ = ("_bus", "_reply", "payload", "subject")

    def __init__(self, bus: BusClient, subject: str, payload: bytes, reply: str) -> None:
        self._bus = bus
        self._reply = reply
        self.subject = subject
        self.payload = payload

    async def respond(self, payload: bytes) -> None:
        if self._reply:
            await self._bus.publish(self._reply, payload)


class BusSubscription(Subscription):
    """One subscription, for as long as its owner wants it, over any number of connections."""

    def __init__(self, bus: BusClient, subscription_id: int, pattern: str, inlet: Inlet) -> None:
        self._bus = bus
        self.subscription_id = subscription_id
        self.pattern = pattern
        self.inlet = inlet

    def deliver(self, subject: str, payload: bytes, reply: str) -> None:
        self.inlet.put(ReceivedMessage(self._bus, subject, payload, reply))

    async def close(self) -> None:
        if not self.inlet.closed:
            self.inlet.close()
            await self._bus.unsubscribe(self)


class BusClient(Bus):
    """The half of a bus that does not depend on what carries its messages.

    `max_pending` bounds the messages of one subscription that wait for its handler.
    """

    def __init__(self, settings: BusSettings, runtime: Runtime, *, max_pending: int = MAX_PENDING_MESSAGES) -> None:
        self.counters = BusCounters()
        self._settings = settings
        self._runtime = runtime
        self._max_pending = max_pending
        self._log: Any = structlog.get_logger("kvferry.bus").bind(bus=settings.name)
        # The random part keeps answers apart from those to a predecessor of the same name.
        self._answers = Answers(f"{settings.inbox_prefix}.{runtime.random_bytes(8).hex()}")
        self._subscriptions: dict[int, BusSubscription] = {}  # in the order of subscribing
        self._next_subscription_id = 0
        self._listeners: list[Callable[[bool], None]] = []
        self._connected = False
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._connected

    def on_change(self, listener: Callable[[bool], None]) -> None:
        self._listeners.append(listener)

    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        check_pattern(subject)
        self._check_connected()
        inlet = Inlet(handler, self.counters, self._log, self._max_pending)
        subscription = BusSubscription(self, self._next_subscription_id, subject, inlet)
        self._next_subscription_id += 1
        self._subscriptions[subscription.subscription_id] = subscription
        try:
            await self._attach(subscription)
        except BaseException:
            await subscription.close()
            raise
        return subscription

    async def unsubscribe(self, subscription: BusSubscription) -> None:
        """`BusSubscription.close` ends here."""
        self._subscriptions.pop(subscription.subscription_id, None)
        await self._detach(subscription)

    async def publish(self, subject: str, payload: bytes) -> None:
        self._check(subject, payload)
        await self._send(subject, payload, "")

    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        self._check(subject, payload)
        inbox, answer = self._answers.open()
        try:
            async with asyncio.timeout(timeout):
                await self._send(subject, payload, inbox)
                return await answer
        except TimeoutError:
            raise BusTimeout(subject, timeout) from None
        except NobodyListens:
            raise NoResponders(subject) from None
        finally:
            self._answers.drop(inbox)

    def _check(self, subject: str, payload: bytes) -> None:
        check_subject(subject)
        self._check_connected()
        if len(payload) > self.max_payload:
            raise PayloadTooLarge(len(payload), self.max_payload)

    def _check_connected(self) -> None:
        if self._closed:
            raise BusUnavailable("the bus is closed")
        if not self._connected:
            raise BusUnavailable("the bus is not connected")

    def _check_server(self, max_payload: int) -> None:
        if max_payload < self._settings.min_payload:
            raise SettingError(
                "max_payload",
                f"the NATS server takes messages of {max_payload} bytes, {self._settings.min_payload} are "
                f"needed: set `max_payload: {self._settings.min_payload}` in the nats-server's configuration",
            )

    def _reconnect_wait(self) -> float:
        return MIN_RECONNECT_WAIT + (MAX_RECONNECT_WAIT - MIN_RECONNECT_WAIT) * self._runtime.uniform()

    def _set_connected(self, connected: bool) -> None:
        """Change the state, fail what waits for an answer if it is a loss, tell the listeners."""
        self._connected = connected
        if not connected:
            self._answers.fail_all("the connection to the bus was lost")
        for listener in self._listeners:
            try:
                listener(connected)
            except Exception:
                self.counters.handler_errors += 1
                self._log.exception("bus listener failed")

    def _close_subscriptions(self) -> None:
        for subscription in self._subscriptions.values():
            subscription.inlet.close()
        self._subscriptions.clear()

    @abstractmethod
    async def _attach(self, subscription: BusSubscription) -> None:
        """Make the server deliver to it; returns when it does. Raises `BusUnavailable`."""

    @abstractmethod
    async def _detach(self, subscription: BusSubscription) -> None:
        """Tell the server to deliver no more, if connected."""

    @abstractmethod
    async def _send(self, subject: str, payload: bytes, reply: str) -> None:
        """Send a checked message. Raises `BusUnavailable`."""
