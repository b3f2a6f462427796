"""The bus over NATS.

Life of a connection:
1. A fresh link (`nats_link.py`) connects, once: no retry of its own.
2. All subscriptions are made on it: the one for answers, then the owner's.
3. A message to our own inbox comes back: the server has them all. Only now is the bus connected.
4. Each second another such message proves the connection, in both directions.
5. A lost connection (end of file, an error from the server, two echoes missed) fails every pending request,
   and is thrown away. After 0.1 to 1 s: 1.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Final

from kvferry.bus.base import BusSettings
from kvferry.bus.client import BusClient, BusSubscription
from kvferry.bus.inlet import MAX_PENDING_MESSAGES
from kvferry.bus.nats_link import NatsLink, reason_of, redacted
from kvferry.errors import BusError, BusUnavailable, SettingError
from kvferry.runtime import Runtime, TaskSet

ECHO_INTERVAL: Final = 1.0
MAX_MISSED_ECHOES: Final = 2


class NatsBus(BusClient):
    """One process' connection to NATS."""

    def __init__(self, settings: BusSettings, runtime: Runtime, *, max_pending: int = MAX_PENDING_MESSAGES) -> None:
        super().__init__(settings, runtime, max_pending=max_pending)
        self._link: NatsLink | None = None
        self._links: set[NatsLink] = set()  # opened and not yet disposed of: ours, and one that was lost
        self._urls = [url for part in settings.url.split(",") if (url := part.strip())]
        self._next_url = 0  # the servers of a cluster take turns: the one that was lost comes last
        self._max_payload = 0
        self._started = False
        self._tasks = TaskSet(self._task_failed)

    @property
    def max_payload(self) -> int:
        return self._max_payload

    async def start(self) -> None:
        assert not self._started, "a bus starts once"
        self._started = True
        link = await self._open()
        self._link = link
        self._set_connected(True)
        self._tasks.spawn(self._supervise(link), name=f"bus {self._settings.name}")

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._tasks.cancel()
        link, self._link = self._link, None
        if link is not None and not link.lost.is_set():
            await self._echo(link)  # all that we published is at the server when it comes back
        self._connected = False
        for left in list(self._links):
            await self._dispose(left)
        self._close_subscriptions()
        self._answers.fail_all("the bus is closed")

    async def _open(self) -> NatsLink:
        """A connection to the first server that has one for us. Raises `BusUnavailable` or `SettingError`."""
        failed = BusUnavailable("no NATS server is named: set KVFERRY_NATS_URL")
        for _ in self._urls:
            url = self._urls[self._next_url]
            self._next_url = (self._next_url + 1) % len(self._urls)
            try:
                return await self._open_at(url)
            except BusUnavailable as error:
                failed = error
        raise failed

    async def _open_at(self, url: str) -> NatsLink:
        """A connection with all subscriptions in place. Raises `BusUnavailable` or `SettingError`."""
        link = NatsLink(self._lost, self._report)
        self._links.add(link)
        try:
            await link.connect(self._settings, url)
            self._check_server(link.max_payload)
            await link.subscribe(self._answers.pattern, self._answer_arrived)
            for subscription in list(self._subscriptions.values()):
                await self._attach_to(link, subscription)
            returned = await self._echo(link)
            if link.refusals:
                raise _not_permitted(link.refusals[0])
            if not returned:
                raise BusUnavailable(f"NATS at {redacted(url)} does not return our messages")
            for subscription_id in [held for held in link.subscriptions if held not in self._subscriptions]:
                await link.unsubscribe(subscription_id)  # closed by its owner while we connected
        except BaseException:
            await self._dispose(link)
            raise
        self._max_payload = link.max_payload
        return link

    async def _dispose(self, link: NatsLink) -> None:
        await link.dispose()
        self._links.discard(link)  # only now: whoever is cancelled before leaves it to `close`

    async def _supervise(self, link: NatsLink) -> None:
        while True:
            await self._watch(link)
            if link is self._link:
                self._lost(link)
            await self._dispose(link)
            link = await self._reopen()
            self._link = link
            self.counters.reconnects += 1
            self._log.info("bus reconnected")
            self._set_connected(True)

    async def _watch(self, link: NatsLink) -> None:
        """Returns when the connection is lost."""
        missed = 0
        while missed < MAX_MISSED_ECHOES:
            if not missed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(ECHO_INTERVAL):
                        await link.lost.wait()
            if link.lost.is_set():
                return
            # One miss is not enough: after a stall of our own loop its timers run before its sockets.
            missed = 0 if await self._echo(link) else missed + 1

    async def _reopen(self) -> NatsLink:
        told = ""  # what is wrong with a file of ours, which is read again for each connection
        while True:
            await asyncio.sleep(self._reconnect_wait())
            try:
                return await self._open()
            except SettingError as error:
                if (problem := str(error)) != told:
                    self._log.error("bus still down", problem=problem)
                told = problem
            except BusError as error:
                self._log.debug("bus still down", error=str(error))
            except Exception:  # nobody else would ever connect again
                self._log.exception("bus still down")

    async def _echo(self, link: NatsLink) -> bool:
        """Whether a message to our own inbox comes back: all that we sent before has been processed then."""
        inbox, answer = self._answers.open()
        try:
            async with asyncio.timeout(ECHO_INTERVAL):
                await link.send(inbox, b"", "")
                await answer
        except (BusUnavailable, TimeoutError):
            return False
        finally:
            self._answers.drop(inbox)
        return True

    def _lost(self, link: NatsLink) -> None:
        link.lost.set()
        if link is self._link:
            self._link = None
            self._log.warning("bus connection lost")
            self._set_connected(False)
        else:  # it was lost while it was being opened; nothing but its echo can be waiting
            self._answers.fail_all("the connection to NATS was lost")

    async def _attach(self, subscription: BusSubscription) -> None:
        link = self._link
        assert link is not None, "the base class has checked that we are connected"
        await self._attach_to(link, subscription)
        if not await self._echo(link):
            raise BusUnavailable("the connection to NATS was lost while subscribing")
        # nats-py makes small letters of what a server says.
        if refusal := next((text for text in link.refusals if f'to "{subscription.pattern.lower()}"' in text), None):
            raise _not_permitted(refusal)

    async def _attach_to(self, link: NatsLink, subscription: BusSubscription) -> None:
        def deliver(subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
            subscription.deliver(subject, payload, reply)

        await link.subscribe(subscription.pattern, deliver, subscription.subscription_id)

    async def _detach(self, subscription: BusSubscription) -> None:
        if self._link is not None:
            await self._link.unsubscribe(subscription.subscription_id)

    async def _send(self, subject: str, payload: bytes, reply: str) -> None:
        link = self._link
        assert link is not None, "the base class has checked that we are connected"
        await link.send(subject, payload, reply)

    def _answer_arrived(self, subject: str, payload: bytes, reply: str, headers: Mapping[str, str] | None) -> None:
        no_responders = not payload and (headers or {}).get("Status") == "503"
        self._answers.arrived(subject, payload, no_responders=no_responders)

    def _report(self, error: Exception) -> None:
        self._log.warning("NATS reports an error", error=reason_of(error))

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._log.error("bus task failed", task=name, exc_info=error)


def _not_permitted(refusal: str) -> BusUnavailable:
    return BusUnavailable(f"{refusal}: check the rights of KVFERRY_NATS_USER, and KVFERRY_CLUSTER")
