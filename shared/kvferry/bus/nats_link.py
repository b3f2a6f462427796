"""One connection to NATS. The only file that imports nats-py.

A client serves one connection only: nats-py keeps commands that a broken or frozen connection did not take and sends
them after its own reconnect, when they are stale; and an error that the server reports (a credential that expired, a
protocol violation) closes its client for good.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import Final

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.aio.transport import TcpTransport
from nats.errors import Error as NatsError
from nats.errors import UnexpectedEOF

from kvferry.bus.base import BusSettings
from kvferry.bus.nats_intake import Deliver, Intake
from kvferry.certificate import client_context, show_certificate
from kvferry.errors import BusUnavailable

CONNECT_TIMEOUT: Final = 2  # seconds, for each step of a connect
DISPOSE_TIMEOUT: Final = 1.0
MAX_OUTBOUND_BYTES: Final = 64 << 20  # accepted from us, not yet taken by the socket
MAX_REFUSALS: Final = 64  # kept of one connection
TLS_SETTINGS: Final = ("KVFERRY_NATS_TLS_CERT", "KVFERRY_NATS_TLS_KEY", "")
_NEVER: Final = 10**9  # seconds; nats-py's own pings are replaced by the bus's echo
# What nats-py lets through when the connection breaks beneath it; of a closed socket uvloop says RuntimeError.
_BROKEN: Final = (NatsError, OSError, RuntimeError)
# What is wrong where a connection fails for this reason; else it is the address.
_SETTING_OF: Final = {
    "CERTIFICATE_VERIFY_FAILED": "KVFERRY_NATS_TLS_CA",
    "Authorization Violation": "KVFERRY_NATS_USER, its password, and KVFERRY_CLUSTER",
}
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

    def __init__(self, deliver: Deliver) -> None:
        super().__init__()
        self._deliver = deliver

    def set_result(self, result: Msg) -> None:
        self._deliver(result.subject, result.data, result.reply, result.headers)


class NatsLink:
    """From connect to disposal."""

    def __init__(self, on_lost: Callable[[NatsLink], None], report: Callable[[Exception], None]) -> None:
        self.client = _Client()
        self.refusals: list[str] = []  # what the server has said that our user may not do
        self.subscriptions: dict[int, Subscription] = {}
        self._taps: dict[int, Deliver] = {}  # by the id that the server knows a subscription by
        self.lost = asyncio.Event()
        self._on_lost = on_lost
        self._report = report
        self._connecting = True
        self._disposed = asyncio.Event()

    @property
    def max_payload(self) -> int:
        """Valid once connected."""
        return self.client.max_payload

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
            reason = reason_of(error)
            setting = next((name for part, name in _SETTING_OF.items() if part in reason), "KVFERRY_NATS_URL")
            raise BusUnavailable(f"no NATS server at {redacted(url)} ({reason}): check {setting}") from None
        self._connecting = False
        self._stand_before()

    def _stand_before(self) -> None:
        """From here on plain messages pass nats-py by."""
        wire = self.client._transport
        assert isinstance(wire, TcpTransport)
        assert wire._io_writer is not None
        assert wire._io_reader is not None
        transport, reader, parser = wire._io_writer.transport, wire._io_reader, self.client._ps
        behind = transport.get_protocol()
        assert isinstance(behind, asyncio.Protocol)

        def is_idle() -> bool:
            return not reader._buffer and not parser.buf  # type: ignore[attr-defined]  # typeshed leaves it out

        transport.set_protocol(Intake(behind, is_idle, self._taps))

    async def subscribe(self, pattern: str, deliver: Deliver, subscription_id: int | None = None) -> None:
        """With an id, `unsubscribe` can end it before the connection ends."""
        try:
            made = await self.client.subscribe(pattern, future=_Tap(deliver))
        except _BROKEN as error:
            raise BusUnavailable(f"the connection to NATS is closed ({reason_of(error)})") from None
        self._taps[made._id] = deliver
        if subscription_id is not None:
            self.subscriptions[subscription_id] = made

    async def unsubscribe(self, subscription_id: int) -> None:
        made = self.subscriptions.pop(subscription_id, None)
        if made is not None:
            self._taps.pop(made._id, None)
            with contextlib.suppress(*_BROKEN):  # the connection, and all with it, has gone
                await made.unsubscribe()

    async def send(self, subject: str, payload: bytes, reply: str) -> None:
        if self.client.pending_data_size > MAX_OUTBOUND_BYTES:
            raise BusUnavailable(f"NATS has not taken the last {MAX_OUTBOUND_BYTES} bytes")
        try:
            await self.client.publish(subject, payload, reply)
        except _BROKEN as error:
            raise BusUnavailable(f"the connection to NATS is closed ({reason_of(error)})") from None

    async def dispose(self) -> None:
        """End the connection now. What was not sent is lost."""
        self._connecting = False
        self.lost.set()
        self._disposed.set()
        self._taps.clear()
        # First the socket: nats-py's close would wait until a frozen server takes all that is buffered, which
        # is stale by then. nats-py offers no abort of its own.
        transport = self.client._transport
        if transport is None:
            return  # it never came to a connection
        if isinstance(transport, TcpTransport) and transport._io_writer is not None:
            transport._io_writer.transport.abort()
        # In a task of its own: nats-py's close shares a future with the reconnect that it cancels, and may end as if
        # it had been cancelled itself. Whoever disposes would end with it, and nobody would connect again.
        closing = asyncio.get_running_loop().create_task(self.client.close(), name="nats close")
        try:
            await asyncio.wait((closing,), timeout=DISPOSE_TIMEOUT)
        finally:
            closing.cancel()
        await self._end_tasks(closing)
        if closing.done() and not closing.cancelled():
            with contextlib.suppress(*_BROKEN):  # the farewell of a dead connection may fail
                closing.result()

    async def _end_tasks(self, closing: asyncio.Task[None]) -> None:
        """nats-py's close gives its tasks one turn of the loop, and none where it was cancelled the first time."""
        client = self.client
        own = (client._reading_task, client._flusher_task, client._ping_interval_task, client._reconnection_task)
        tasks = [closing, *(task for task in own if task is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks, timeout=DISPOSE_TIMEOUT)

    async def _on_error(self, error: Exception) -> None:
        if self._connecting:
            raise _ConnectFailed(reason_of(error))
        if self.lost.is_set() or isinstance(error, UnexpectedEOF):  # an end of file is told as a loss
            return
        if _REFUSED in (reason := reason_of(error)) and len(self.refusals) < MAX_REFUSALS:
            self.refusals.append(reason)
        self._report(error)

    async def _on_disconnected(self) -> None:
        if not self.lost.is_set():
            self.lost.set()
            self._on_lost(self)
        # nats-py begins its own reconnect when this returns, unless the client is closed by then.
        await self._disposed.wait()


def _tls(settings: BusSettings) -> ssl.SSLContext | None:
    if not (settings.tls_ca or settings.tls_cert):
        return None
    context = client_context(settings.tls_ca, "KVFERRY_NATS_TLS_CA")
    if settings.tls_cert:
        show_certificate(context, settings.tls_cert, settings.tls_key or settings.tls_cert, "", TLS_SETTINGS)
    return context


def redacted(url: str) -> str:
    """The address without credentials."""
    scheme, separator, address = url.rpartition("://")
    return scheme + separator + address.rpartition("@")[2]


def reason_of(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error) or type(error).__name__
