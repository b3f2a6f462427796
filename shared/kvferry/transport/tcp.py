"""The data plane over plain TCP. Needs nothing but sockets, and withstands garbage.

Each message has a 13-byte header, little-endian:

    offset  type  field
     0      u8    kind: 1 flow message, 2 frame
     1      u32   payload bytes
     5      u64   tag of a frame, 0 for a flow message

A frame is received straight into the posted buffer and sent straight from the caller's: the sockets are
driven with `sock_recv_into` and `sock_sendall`, not through stream transports, because asyncio's (3.11)
copies what a socket does not take at once, and no stream transport says when it has let go of a buffer.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from kvferry.errors import ConnectionClosed, CorruptFrame, TransportUnavailable
from kvferry.runtime import Runtime
from kvferry.transport.backend import Backend, format_address, parse_address
from kvferry.transport.base import Connection, TransportCounters, TransportSettings
from kvferry.transport.link import Link, Transfer
from kvferry.wire.flow import MAX_FLOW_BYTES

HEADER: Final = struct.Struct("<BIQ")
KIND_FLOW: Final = 1
KIND_FRAME: Final = 2
MAX_FRAME_BYTES: Final = 1 << 28  # a frame that claims more is no frame
INBOX_BYTES: Final = 16 * 1024  # headers and flow messages; what it catches of a frame is copied once
MAX_DIRECT_RECEIVES: Final = 2  # in a row before other work of the loop gets its turn
ACCEPT_RETRY_SECONDS: Final = 0.1  # after accept() failed, as when this process has no descriptor left
LOCAL_SEND_BYTES: Final = 512 * 1024  # under way to a peer on this host: it reads them before they have left the cache


class _ProtocolError(Exception):
    """The peer's bytes are not of this protocol."""


@dataclass(slots=True)
class _Outgoing:
    header: bytes
    payload: memoryview
    transfer: Transfer[None] | None  # None for a flow message


@dataclass(slots=True)
class _Posted:
    buffer: memoryview
    transfer: Transfer[int]


class TcpLink(Link):
    """One socket: a task that reads, a task that writes, and one that ends both."""

    def __init__(self, sock: socket.socket, counters: TransportCounters, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(counters, loop)
        _tune(sock)
        self._sock = sock
        self._outbox: deque[_Outgoing] = deque()
        self._posted: dict[int, _Posted] = {}
        self._num_direct = 0
        self._wake = asyncio.Event()
        self._stop: asyncio.Future[None] = loop.create_future()
        self._task = loop.create_task(self._run(), name="kvferry tcp connection")

    async def _run(self) -> None:
        reader = self._loop.create_task(self._read(), name="kvferry tcp reader")
        writer = self._loop.create_task(self._write(), name="kvferry tcp writer")
        try:
            # A writer that has drained leaves the reader waiting for the peer's own end: closing with
            # unread bytes would reset the connection and lose what we sent last.
            await asyncio.wait({reader, self._stop}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._closing = True
            reader.cancel()
            writer.cancel()
            results = await asyncio.gather(reader, writer, return_exceptions=True)
            self._sock.close()
            self._release_buffers()
            for result in results:
                self._account(result)
            self.finish()

    def _account(self, result: BaseException | None) -> None:
        if isinstance(result, _ProtocolError):
            self._counters.protocol_errors += 1
        elif isinstance(result, Exception):
            self._loop.call_exception_handler({"message": "a TCP connection failed", "exception": result})

    def _release_buffers(self) -> None:
        error = ConnectionClosed("the connection has ended")
        for posted in self._posted.values():
            posted.transfer.fail(error)
        for outgoing in self._outbox:
            if outgoing.transfer is not None:
                outgoing.transfer.fail(error)
        self._posted.clear()
        self._outbox.clear()

    # Sending

    def _transmit(self, message: bytes) -> None:
        self._put(_Outgoing(HEADER.pack(KIND_FLOW, len(message), 0), memoryview(message), None))

    def _send_frame(self, tag: int, frame: memoryview, transfer: Transfer[None]) -> None:
        if len(frame) > MAX_FRAME_BYTES:
            raise ValueError(f"frame of {len(frame)} bytes, at most {MAX_FRAME_BYTES} fit")
        self._put(_Outgoing(HEADER.pack(KIND_FRAME, len(frame), tag), frame, transfer))

    def _put(self, outgoing: _Outgoing) -> None:
        self._outbox.append(outgoing)
        self._wake.set()

    async def _write(self) -> None:
        try:
            while True:
                while self._outbox:
                    await self._write_one(self._outbox[0])
                    outgoing = self._outbox.popleft()
                    self._counters.sent_bytes += len(outgoing.payload)
                    if outgoing.transfer is not None:
                        outgoing.transfer.succeed(None)
                if self._closing:
                    self._sock.shutdown(socket.SHUT_WR)
                    return
                self._wake.clear()
                await self._wake.wait()
        except OSError:
            self._tear_down()

    async def _write_one(self, outgoing: _Outgoing) -> None:
        try:
            sent = self._sock.sendmsg([outgoing.header, outgoing.payload])
        except BlockingIOError:
            sent = 0
        if sent < HEADER.size:
            await self._loop.sock_sendall(self._sock, outgoing.header[sent:])
            sent = HEADER.size
        if rest := outgoing.payload[sent - HEADER.size :]:
            await self._loop.sock_sendall(self._sock, rest)

    # Receiving

    def _post_receive(self, tag: int, buffer: memoryview, transfer: Transfer[int]) -> None:
        if tag in self._posted:
            raise ValueError(f"a receive is posted under tag {tag}")
        self._posted[tag] = _Posted(buffer, transfer)

    async def _read(self) -> None:
        inbox = memoryview(bytearray(INBOX_BYTES))
        start = end = 0
        with contextlib.suppress(OSError):
            while True:
                start = await self._take(inbox, start, end)
                inbox[: end - start] = bytes(inbox[start:end])
                start, end = 0, end - start
                count = await self._receive(inbox[end:])
                if count == 0:
                    return
                end += count

    async def _take(self, inbox: memoryview, start: int, end: int) -> int:
        """Handle every whole message in `inbox[start:end]`; return where the rest begins."""
        while end - start >= HEADER.size and not self._stop.done():
            kind, length, tag = HEADER.unpack_from(inbox, start)
            body = start + HEADER.size
            if kind == KIND_FLOW and length <= MAX_FLOW_BYTES:
                if end - body < length:
                    break
                self.arrived(inbox[body : body + length])
                start = body + length
            elif kind == KIND_FRAME and length <= MAX_FRAME_BYTES:
                start = min(body + length, end)
                await self._take_frame(tag, length, inbox[body:start])
            else:
                raise _ProtocolError
        return start

    async def _take_frame(self, tag: int, length: int, caught: memoryview) -> None:
        """Receive a frame whose first bytes are `caught`."""
        posted = self._posted.get(tag)
        if posted is None:
            raise _ProtocolError
        if length > len(posted.buffer):
            await self._skip(length - len(caught))
            posted.transfer.fail(CorruptFrame("long", f"{length} bytes into {len(posted.buffer)}"))
        else:
            posted.buffer[: len(caught)] = caught
            await self._fill(posted.buffer[len(caught) : length])
            self._counters.received_bytes += length
            posted.transfer.succeed(length)
        # Only now: until here an end of the connection must find the buffer among those to release.
        del self._posted[tag]

    async def _fill(self, view: memoryview) -> None:
        while view:
            count = await self._receive(view)
            if count == 0:
                raise ConnectionResetError("the peer ended the connection within a frame")
            view = view[count:]

    async def _receive(self, view: memoryview) -> int:
        """Some bytes, 0 at the end. What has come already is taken without a turn of the loop, within limits."""
        if self._num_direct < MAX_DIRECT_RECEIVES:
            self._num_direct += 1
            with contextlib.suppress(BlockingIOError):
                return self._sock.recv_into(view)
        self._num_direct = 0
        return await self._loop.sock_recv_into(self._sock, view)

    async def _skip(self, count: int) -> None:
        waste = memoryview(bytearray(min(count, INBOX_BYTES)))
        while count:
            part = min(count, len(waste))
            await self._fill(waste[:part])
            count -= part

    # Ending

    def _drain(self) -> None:
        self._wake.set()

    def _tear_down(self) -> None:
        if not self._stop.done():
            self._stop.set_result(None)


class TcpTransport(Backend):
    """Listens on one port and connects from others."""

    scheme = "tcp"

    def __init__(self, settings: TransportSettings, runtime: Runtime) -> None:
        super().__init__(settings, runtime)
        self._listener: socket.socket | None = None
        self._port = 0
        self._acceptor: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        assert self._port, "start first"
        return format_address(self.scheme, self._settings.advertise_host, self._port)

    async def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        host, port = self._settings.host, self._settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=128)
        except OSError as error:
            raise TransportUnavailable("tcp", f"cannot listen on {host}:{port}: {error}") from None
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._acceptor = asyncio.get_running_loop().create_task(
            self._accept(self._listener), name="kvferry tcp acceptor"
        )

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            if self._full:
                self.counters.refused_handshakes += 1
                sock.close()
            else:
                self._welcome(TcpLink(sock, self.counters, loop))

    async def connect(self, address: str, timeout: float) -> Connection:
        self._check_open()
        host, port = parse_address(self.scheme, address)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        async with asyncio.timeout_at(deadline):
            sock = await _connect(host, port)
        return await self._introduce(TcpLink(sock, self.counters, loop), deadline - loop.time())

    async def close(self) -> None:
        if self._acceptor is not None:
            self._acceptor.cancel()
            await asyncio.wait({self._acceptor})
        if self._listener is not None:
            self._listener.close()
        await self._close_links()


async def _connect(host: str, port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    failure = OSError("no address")
    try:
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionClosed(f"cannot resolve {host}: {error}") from None
    for family, kind, protocol, _, target in found:
        sock = socket.socket(family, kind, protocol)
        sock.setblocking(False)
        try:
            await loop.sock_connect(sock, target)
        except OSError as error:
            failure = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise ConnectionClosed(f"cannot connect to {host}:{port}: {failure}")


def _tune(sock: socket.socket) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # A peer whose machine is gone ends the connection after 2 + 3 × 1 s, also when we have nothing to send.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    with contextlib.suppress(OSError):  # the peer has gone already
        if sock.getpeername()[0] == sock.getsockname()[0]:  # else the kernel finds the size that the network needs
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_SEND_BYTES)
