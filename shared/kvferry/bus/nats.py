"""The bus over NATS. The only file that imports nats-py.

Life of a connection:
1. A fresh nats-py client connects, once: no retry of its own.
2. All subscriptions are made on it: the one for answers, then the owner's.
3. A message to our own inbox comes back: the server has them all. Only now is the bus connected.
4. Each second another such message proves the connection, in both directions.
5. A lost connection (end of file, an error from the server, two echoes missed) fails every pending request,
   and is thrown away with its client. After 0.1 to 1 s: 1.

Why a client serves one connection only: nats-py keeps commands that a broken or frozen connection did not
take and sends them after its own reconnect, when they are stale; and an error that the server reports
(a credential that expired, a protocol violation) closes its client for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription as NatsSubscription
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.errors import UnexpectedEOF

from kvferry.bus.base import BusSettings
from kvferry.bus.client import BusClient, BusSubscription
from kvferry.bus.inlet import MAX_PENDING_MESSAGES
from kvferry.certificate import client_context, show_certificate
from kvferry.errors import BusError, BusUnavailable, SettingError
from kvferry.runtime import Runtime, TaskSet

CONNECT_TIMEOUT: Final = 2  # seconds, for each step of a connect
ECHO_INTERVAL: Final = 1.0
MAX_MISSED_ECHOES: Final = 2
DISPOSE_TIMEOUT: Final = 1.0
MAX_OUTBOUND_BYTES: Final = 64 << 20  # accepted from us, not yet taken by the socket
MAX_REFUSALS: Final = 64  # kept of one connection
_NEVER: Final = 10**9  # seconds; nats-py's own pings are replaced by the echo
# What nats-py lets through when the connection breaks beneath it; of a closed socket uvloop says RuntimeError.
_BROKEN: Final = (NatsError, OSError, RuntimeError)


TLS_SETTINGS: Final = ("KVFERRY_NATS_TLS_CERT", "KVFERRY_NATS_TLS_KEY", "")
_REFUSED: Final = "permissions violation"  # as nats-py passes it on


class _ConnectFailed(Exception):
    """Raised inside nats-py's error callback: the one way out of its endless first connect."""


class _Client(Client):
    """nats-py's client goes on in the clear, password and all, where the server asks for no TLS; this one does not."""

    needs_tls = False

    def _connect_command(self) -> bytes:
        transport = self._transport
        assert isinstance(transport, TcpTransport)
        assert transport._io_writer is not None
        if self.needs_tls and transport._io_writer.get_extra_info("ssl_object") is None:
            raise NatsError("it offers no TLS, which our settings ask for")
        return super()._connect_command()


class _Tap(asyncio.Future[Msg]):
    """Passes each message of a subscription straight on to its inlet.

    nats-py gives the messages of a subscription made with `future=` to its `set_result`, and never asks whether
    it is done, only whether it was cancelled. One made with `cb=` has a queue and a task of its own, which would
    stand in front of the inlet and outlive `close` by a turn of the loop.
    """

    def __init__(self, deliver: Callable[[Msg], None]) -> None:
        super().__init__()
        self._deliver = deliver

    def set_result(self, result: Msg) -> None:
        self._deliver(result)


class _Link:
    """One connection with the nats-py client that serves it, from connect to disposal."""

    def __init__(self, on_lost: Callable[[_Link], None], report: Callable[[Exception], None]) -> None:
        self.client = _Client()
        self.refusals: list[str] = []  # what the server has said that our user may not do
        self.subscriptions: dict[int, NatsSubscription] = {}
        self.lost = asyncio.Event()
        self._on_lost = on_lost
        self._report = report
        self._connecting = True
        self._disposed = asyncio.Event()

    async def connect(self, settings: BusSettings, url: str) -> None:
        """Raises `BusUnavailable` or `SettingError`."""
        tls = _tls(settings)
        self.client.needs_tls = tls is not None or url.startswith("tls://")
        try:
            await self.client.connect(
                servers=[url],
                name=settings.name,
                user=settings.user or None,
                password=settings.password or None,
                token=settings.token or None,
                tls=tls,
                connect_timeout=CONNECT_TIMEOUT,
                ping_interval=_NEVER,
                pending_size=-1,  # buffer nothing while disconnected
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
            )
        except (_ConnectFailed, *_BROKEN) as error:
            reason = _reason(error)
            setting = "KVFERRY_NATS_TLS_CA" if "CERTIFICATE_VERIFY_FAILED" in reason else "KVFERRY_NATS_URL"
            raise BusUnavailable(f"no NATS server at {_redacted(url)} ({reason}): check {setting}") from None
        self._connecting = False

    async def subscribe(self, pattern: str, deliver: Callable[[Msg], None], subscription_id: int | None = None) -> None:
        """With an id, `unsubscribe` can end it before the connection ends."""
        try:
            made = await self.client.subscribe(pattern, future=_Tap(deliver))
        except _BROKEN as error:
            raise BusUnavailable(f"the connection to NATS is closed ({_reason(error)})") from None
        if subscription_id is not None:
            self.subscriptions[subscription_id] = made

    async def unsubscribe(self, subscription_id: int) -> None:
        made = self.subscriptions.pop(subscription_id, None)
        if made is not None:
            with contextlib.suppress(*_BROKEN):  # the connection, and all with it, has gone
                await made.unsubscribe()

    async def send(self, subject: str, payload: bytes, reply: str) -> None:
        if self.client.pending_data_size > MAX_OUTBOUND_BYTES:
            raise BusUnavailable(f"NATS has not taken the last {MAX_OUTBOUND_BYTES} bytes")
        try:
            await self.client.publish(subject, payload, reply)
        except _BROKEN as error:
            raise BusUnavailable(f"the connection to NATS is closed ({_reason(error)})") from None

    async def dispose(self) -> None:
        """End the connection now. What was not sent is lost."""
        self._connecting = False
        self.lost.set()
        self._disposed.set()
        # First the socket: nats-py's close would wait until a frozen server takes all that is buffered, which
        # is stale by then. nats-py offers no abort of its own.
        transport = self.client._transport
        if transport is None:
            return  # it never came to a connection
        if isinstance(transport, TcpTransport) and transport._io_writer is not None:
            transport._io_writer.transport.abort()
        with contextlib.suppress(*_BROKEN):  # the farewell of a dead connection may fail
            async with asyncio.timeout(DISPOSE_TIMEOUT):
                await self.client.close()

    async def _on_error(self, error: Exception) -> None:
        if self._connecting:
            raise _ConnectFailed(_reason(error))
        if self.lost.is_set() or isinstance(error, UnexpectedEOF):  # an end of file is told as a loss
            return
        if _REFUSED in (reason := _reason(error)) and len(self.refusals) < MAX_REFUSALS:
            self.refusals.append(reason)
        self._report(error)

    async def _on_disconnected(self) -> None:
        if not self.lost.is_set():
            self.lost.set()
            self._on_lost(self)
        # nats-py begins its own reconnect when this returns, unless the client is closed by then.
        await self._disposed.wait()


class NatsBus(BusClient):
    """One process' connection to NATS."""

    def __init__(self, settings: BusSettings, runtime: Runtime, *, max_pending: int = MAX_PENDING_MESSAGES) -> None:
        super().__init__(settings, runtime, max_pending=max_pending)
        self._link: _Link | None = None
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
        if link is not None:
            if not link.lost.is_set():
                await self._echo(link)  # all that we published is at the server when it comes back
            self._connected = False
            await link.dispose()
        self._close_subscriptions()
        self._answers.fail_all("the bus is closed")

    async def _open(self) -> _Link:
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

    async def _open_at(self, url: str) -> _Link:
        """A connection with all subscriptions in place. Raises `BusUnavailable` or `SettingError`."""
        link = _Link(self._lost, self._report)
        try:
            await link.connect(self._settings, url)
            self._check_server(link.client.max_payload)
            await link.subscribe(self._answers.pattern, self._answer_arrived)
            for subscription in list(self._subscriptions.values()):
                await self._attach_to(link, subscription)
            returned = await self._echo(link)
            if link.refusals:
                raise _not_permitted(link.refusals[0])
            if not returned:
                raise BusUnavailable(f"NATS at {_redacted(url)} does not return our messages")
            for subscription_id in [held for held in link.subscriptions if held not in self._subscriptions]:
                await link.unsubscribe(subscription_id)  # closed by its owner while we connected
        except BaseException:
            await link.dispose()
            raise
        self._max_payload = link.client.max_payload
        return link

    async def _supervise(self, link: _Link) -> None:
        while True:
            await self._watch(link)
            if link is self._link:
                self._lost(link)
            await link.dispose()
            link = await self._reopen()
            self._link = link
            self.counters.reconnects += 1
            self._log.info("bus reconnected")
            self._set_connected(True)

    async def _watch(self, link: _Link) -> None:
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

    async def _reopen(self) -> _Link:
        while True:
            await asyncio.sleep(self._reconnect_wait())
            try:
                return await self._open()
            except (BusError, SettingError) as error:
                self._log.debug("bus still down", error=str(error))
            except Exception:  # nobody else would ever connect again
                self._log.exception("bus still down")

    async def _echo(self, link: _Link) -> bool:
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

    def _lost(self, link: _Link) -> None:
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

    async def _attach_to(self, link: _Link, subscription: BusSubscription) -> None:
        def deliver(message: Msg) -> None:
            subscription.deliver(message.subject, message.data, message.reply)

        await link.subscribe(subscription.pattern, deliver, subscription.subscription_id)

    async def _detach(self, subscription: BusSubscription) -> None:
        if self._link is not None:
            await self._link.unsubscribe(subscription.subscription_id)

    async def _send(self, subject: str, payload: bytes, reply: str) -> None:
        link = self._link
        assert link is not None, "the base class has checked that we are connected"
        await link.send(subject, payload, reply)

    def _answer_arrived(self, message: Msg) -> None:
        no_responders = not message.data and (message.headers or {}).get("Status") == "503"
        self._answers.arrived(message.subject, message.data, no_responders=no_responders)

    def _report(self, error: Exception) -> None:
        self._log.warning("NATS reports an error", error=_reason(error))

    def _task_failed(self, name: str, error: BaseException) -> None:
        self._log.error("bus task failed", task=name, exc_info=error)


def _tls(settings: BusSettings) -> ssl.SSLContext | None:
    if not (settings.tls_ca or settings.tls_cert):
        return None
    context = client_context(settings.tls_ca, "KVFERRY_NATS_TLS_CA")
    if settings.tls_cert:
        show_certificate(context, settings.tls_cert, settings.tls_key or settings.tls_cert, "", TLS_SETTINGS)
    return context


def _not_permitted(refusal: str) -> BusUnavailable:
    return BusUnavailable(f"{refusal}: check the rights of KVFERRY_NATS_USER, and KVFERRY_CLUSTER")


def _redacted(url: str) -> str:
    """The address without credentials."""
    scheme, separator, address = url.rpartition("://")
    return scheme + separator + address.rpartition("@")[2]


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
