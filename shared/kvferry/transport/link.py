"""What the connections of all backends share: handshake, delivery, the order of the end.

    opening ── greeted ──> open ── close()/abort()/peer/failure ──> closing ── buffers free ──> ended

While closing, nothing is accepted or delivered any more, but a buffer stays with the backend until it can
prove that no byte reaches it. Only then do the futures end, and after them `on_closed` runs.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Final, TypeVar

from kvferry.errors import ConnectionClosed, HandshakeRefused
from kvferry.transport.base import Connection, TransportCounters
from kvferry.transport.hello import Handshake
from kvferry.wire.flow import MAX_FLOW_BYTES

FLUSH_SECONDS: Final = 1.0  # `close` waits no longer for what is under way
MAX_EARLY_MESSAGES: Final = 1024  # flow messages kept for an owner that has set no handler yet

T = TypeVar("T")


class Transfer(asyncio.Future[T]):
    """The future of a buffer that the transport holds.

    It cannot be cancelled: it would be done while bytes still arrive. A task that awaits it is cancelled
    when it ends; who must not wait for that awaits `asyncio.shield(future)`, and aborts the connection.
    """

    def cancel(self, msg: Any = None) -> bool:
        return False

    def fail(self, error: Exception) -> None:
        """End with an error that nobody has to look at: `on_closed` tells the owner, too."""
        if not self.done():
            self.set_exception(error)
            self.exception()

    def succeed(self, value: T) -> None:
        if not self.done():
            self.set_result(value)


class Link(Connection):
    """A connection of any backend. Backends implement the four hooks at the end."""

    def __init__(self, counters: TransportCounters, loop: asyncio.AbstractEventLoop) -> None:
        self.peer_incarnation = 0
        self._counters = counters
        self._loop = loop
        self._closing = False
        self._finished = False
        self._ended: asyncio.Future[None] = loop.create_future()
        self._handshake: Handshake | None = None
        self._greeted: Callable[[Exception | None], None] | None = None
        self._greet_timer: asyncio.TimerHandle | None = None
        self._handler: Callable[[memoryview], None] | None = None
        self._early: deque[bytes] = deque()
        self._closed_handlers: list[Callable[[], None]] = []

    # The contract

    @property
    def closed(self) -> bool:
        return self._closing

    def on_message(self, handler: Callable[[memoryview], None]) -> None:
        self._handler = handler
        if self._early:
            self._loop.call_soon(self._deliver_early)

    def on_closed(self, handler: Callable[[], None]) -> None:
        """Several may be set; they run in this order."""
        if self._ended.done():
            self._loop.call_soon(handler)
        else:
            self._closed_handlers.append(handler)

    def send_message(self, message: bytes) -> None:
        if len(message) > MAX_FLOW_BYTES:
            raise ValueError(f"flow message of {len(message)} bytes, at most {MAX_FLOW_BYTES} fit")
        if not self._closing:
            self._transmit(message)

    def send(self, tag: int, frame: memoryview) -> asyncio.Future[None]:
        _check_buffer(tag, frame)
        transfer: Transfer[None] = Transfer(loop=self._loop)
        if self._closing:
            transfer.fail(ConnectionClosed("the connection has ended"))
        else:
            self._send_frame(tag, frame.cast("B"), transfer)
        return transfer

    def receive(self, tag: int, buffer: memoryview) -> asyncio.Future[int]:
        _check_buffer(tag, buffer)
        if buffer.readonly:
            raise ValueError("a receive needs a writable buffer")
        transfer: Transfer[int] = Transfer(loop=self._loop)
        if self._closing:
            transfer.fail(ConnectionClosed("the connection has ended"))
        else:
            self._post_receive(tag, buffer.cast("B"), transfer)
        return transfer

    def abort(self) -> None:
        if not self._finished:
            self._closing = True
            self._tear_down()

    async def close(self) -> None:
        if not self._closing:
            self._closing = True
            self._drain()
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                await asyncio.shield(self._ended)
        except TimeoutError:
            self.abort()
            await asyncio.shield(self._ended)

    # The handshake

    def greet(self, handshake: Handshake, timeout: float, greeted: Callable[[Exception | None], None]) -> None:
        """Send the hello. `greeted` is called once: with None, `HandshakeRefused`, `ConnectionClosed` or
        `TimeoutError`. Until then the link delivers nothing."""
        self._handshake = handshake
        self._greeted = greeted
        self._greet_timer = self._loop.call_later(timeout, self._greeting_late)
        self._transmit(handshake.opening())

    def _greeting_late(self) -> None:
        self._counters.refused_handshakes += 1
        self._end_greeting(TimeoutError("no proof of the data key in time"))
        self.abort()

    def _feed_handshake(self, handshake: Handshake, message: memoryview) -> None:
        try:
            answer = handshake.feed(message)
        except HandshakeRefused as refusal:
            self._counters.refused_handshakes += 1
            self._end_greeting(refusal)
            # Flushed, not aborted: our own proof must reach the peer, so that it learns why.
            self._closing = True
            self._drain()
            self._loop.call_later(FLUSH_SECONDS, self.abort)
            return
        if answer is not None:
            self._transmit(answer)
        if handshake.done:
            self.peer_incarnation = handshake.peer_incarnation
            self._end_greeting(None)

    def _end_greeting(self, error: Exception | None) -> None:
        if self._greet_timer is not None:
            self._greet_timer.cancel()
        greeted, self._greeted = self._greeted, None
        if greeted is not None:
            greeted(error)

    # What backends report

    def arrived(self, message: memoryview) -> None:
        """A flow message has come, in order. The view is valid only during the call."""
        if self._closing:
            return
        self._counters.received_bytes += len(message)
        handshake = self._handshake
        if handshake is not None and not handshake.done:
            self._feed_handshake(handshake, message)
        elif self._handler is not None and not self._early:
            self._call(self._handler, message)
        elif len(self._early) < MAX_EARLY_MESSAGES:
            self._early.append(bytes(message))
        else:
            self.violated()

    def violated(self) -> None:
        """The peer broke the protocol of this backend."""
        self._counters.protocol_errors += 1
        self.abort()

    def finish(self) -> None:
        """All buffers are free and their futures done."""
        if self._finished:
            return
        self._finished = self._closing = True
        self._deliver_early()
        self._end_greeting(ConnectionClosed("the peer ended the connection during the handshake"))
        # Whoever waits for one of those futures is called first.
        self._loop.call_soon(self._announce_end)

    def _announce_end(self) -> None:
        handlers, self._closed_handlers = self._closed_handlers, []
        self._ended.set_result(None)
        for handler in handlers:
            self._call(handler)
        self._handler = None

    def _deliver_early(self) -> None:
        while self._early and self._handler is not None:
            self._call(self._handler, memoryview(self._early.popleft()))

    def _call(self, handler: Callable[..., None], *args: Any) -> None:
        try:
            handler(*args)
        except Exception as error:  # an owner's fault must not end the loop that serves all its connections
            self._loop.call_exception_handler({"message": "a connection handler failed", "exception": error})

    # Hooks

    @abstractmethod
    def _transmit(self, message: bytes) -> None:
        """Queue a flow message."""

    @abstractmethod
    def _send_frame(self, tag: int, frame: memoryview, transfer: Transfer[None]) -> None: ...

    @abstractmethod
    def _post_receive(self, tag: int, buffer: memoryview, transfer: Transfer[int]) -> None:
        """Raises ValueError if a receive is posted under the tag."""

    @abstractmethod
    def _drain(self) -> None:
        """Send what is queued, then tear down."""

    @abstractmethod
    def _tear_down(self) -> None:
        """Stop everything now; `finish` follows when all buffers are free. May be called again."""


def _check_buffer(tag: int, buffer: memoryview) -> None:
    if not 0 <= tag < 1 << 64:
        raise ValueError(f"tag {tag} is not a u64")
    if not buffer.c_contiguous:
        raise ValueError("the buffer must be contiguous")
