"""The data plane over UCX: RDMA where UCX has it, TCP otherwise. The thread is in
`ucx_worker.py`, the endpoints on it in `ucx_endpoints.py`.

Peers connect to a listener, whose port is the one in `address`; UCX opens a second, random port on each
device in `net_devices` for the data itself. Connecting by worker address instead would spare the first
port, but then nobody is told when a live peer ends its connection, and two workers that connect to each
other at once get one connection between them.

UCX neither encrypts nor withstands hostile peers: both ports belong on a private network.

Options are given to the UCX context, not to the environment; a user's `UCX_…` variable wins over each.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from typing import Final

from kvferry.errors import ConnectionClosed, CorruptFrame, TransportUnavailable
from kvferry.runtime import Runtime
from kvferry.transport.backend import Backend, format_address, parse_address
from kvferry.transport.base import Connection, TransportCounters, TransportSettings
from kvferry.transport.libucp import OK, LibUcp
from kvferry.transport.link import Link, Transfer
from kvferry.transport.ucx_endpoint import Endpoint
from kvferry.transport.ucx_worker import UcxWorker

OPTIONS: Final = {
    "TLS": "tcp",  # the wheels carry nothing else that survives a dead peer
    "TCP_TX_SEG_SIZE": "256K",  # 3 to 5 times the throughput of the default 8K
    "TCP_RX_SEG_SIZE": "256K",
    "TCP_CM_REUSEADDR": "y",  # a restart on the same port works at once
    "TCP_KEEPIDLE": "2s",
    "TCP_KEEPINTVL": "1s",
    "TCP_KEEPCNT": "3",
    "RNDV_FRAG_MEM_TYPE": "host",
    # UCX forgets the descriptor of a connection that fills this buffer with something else than its own greeting
    # (2 KiB by default), but notices the end of one that does not.
    "TCP_CM_PRIV_DATA_LEN": "16K",
}
# By itself UCX sends large frames over TCP as fragments, which the receiver's thread then copies once more;
# this way the kernel copies them into the posted buffer. Not for other wires, which UCX chooses well for.
TCP_OPTIONS: Final = {"RNDV_SCHEME": "put_zcopy"}


def context_options(net_devices: str) -> dict[str, str]:
    """What to give the context: our options without those that the user's environment sets."""
    wanted = OPTIONS | {"NET_DEVICES": net_devices}
    if os.environ.get("UCX_TLS", OPTIONS["TLS"]) == "tcp":
        wanted |= TCP_OPTIONS
    return {name: value for name, value in wanted.items() if f"UCX_{name}" not in os.environ}


class UcxLink(Link):
    """The owner's side of one endpoint."""

    def __init__(
        self, worker: UcxWorker, endpoint: Endpoint, counters: TransportCounters, loop: asyncio.AbstractEventLoop
    ) -> None:
        super().__init__(counters, loop)
        self._worker = worker
        self._endpoints = worker.endpoints
        self._endpoint = endpoint
        self._tags: set[int] = set()  # of receives that are posted
        endpoint.owner = self

    def connect(self, host: str, port: int) -> None:
        """Begin to connect a new endpoint to a literal address."""
        self._worker.submit(self._endpoints.connect, self._endpoint, host, port)

    def _transmit(self, message: bytes) -> None:
        self._worker.submit(self._endpoints.send_flow, self._endpoint, message)

    def _send_frame(self, tag: int, frame: memoryview, transfer: Transfer[None]) -> None:
        self._worker.submit(self._endpoints.send_frame, self._endpoint, tag, frame, transfer)

    def _post_receive(self, tag: int, buffer: memoryview, transfer: Transfer[int]) -> None:
        if tag in self._tags:
            raise ValueError(f"a receive is posted under tag {tag}")
        self._tags.add(tag)
        transfer.add_done_callback(lambda _: self._tags.discard(tag))
        self._endpoint.posted[tag] = (buffer, transfer)

    def _drain(self) -> None:
        self._worker.submit(self._endpoints.drain, self._endpoint)

    def _tear_down(self) -> None:
        self._worker.submit(self._endpoints.abort, self._endpoint)

    # Reports of the thread

    def lost(self) -> None:
        self._closing = True

    def gone(self) -> None:
        # What was submitted before `lost` came is answered first, so that `on_closed` is the last word.
        self._closing = True
        self._worker.submit(self._endpoints.confirm, self._endpoint)

    def sent(self, transfer: Transfer[None] | None, num_bytes: int, status: int) -> None:
        if status == OK:
            self._counters.sent_bytes += num_bytes
        if transfer is None:
            return
        if status == OK:
            transfer.succeed(None)
        else:
            transfer.fail(ConnectionClosed("the connection ended while sending"))

    def received(self, transfer: Transfer[int], num_bytes: int, status: int) -> None:
        if status == OK:
            self._counters.received_bytes += num_bytes
            transfer.succeed(num_bytes)
        else:
            transfer.fail(ConnectionClosed("the connection ended while receiving"))

    def too_long(self, transfer: Transfer[int], error: CorruptFrame) -> None:
        transfer.fail(error)


class UcxTransport(Backend):
    """One UCX context, worker, listener and thread."""

    scheme = "ucx"

    def __init__(self, settings: TransportSettings, runtime: Runtime) -> None:
        """Raises `TransportUnavailable` where the UCX library does not load."""
        super().__init__(settings, runtime)
        self._library = LibUcp()
        self._worker: UcxWorker | None = None
        self._thread: asyncio.Task[None] | None = None
        self._port = 0

    @property
    def worker(self) -> UcxWorker:
        """The thread. Valid after `start`."""
        assert self._worker is not None, "start first"
        return self._worker

    @property
    def address(self) -> str:
        assert self._port, "start first"
        return format_address(self.scheme, self._settings.advertise_host, self._port)

    async def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        loop = asyncio.get_running_loop()
        try:
            host = await _resolve(self._settings.host, self._settings.port)
        except ConnectionClosed as error:
            raise TransportUnavailable("ucx", str(error)) from None
        listening: asyncio.Future[int] = loop.create_future()

        def heard(outcome: int | TransportUnavailable) -> None:
            if isinstance(outcome, int):
                listening.set_result(outcome)
            else:
                listening.set_exception(outcome)

        self._worker = UcxWorker(
            self._library, context_options(self._settings.net_devices), self._settings.max_connections,
            loop.call_soon_threadsafe, self._accept, self._reject,
        )  # fmt: skip
        self._thread = loop.create_task(self._run(self._worker, host, heard), name="kvferry ucx thread")
        self._port = await listening

    async def _run(self, worker: UcxWorker, host: str, heard: Callable[[int | TransportUnavailable], None]) -> None:
        lane = self._runtime.lane("kvferry-ucx")
        try:
            # Shielded: the thread ends when it is stopped, and must be waited for until then.
            await asyncio.shield(lane.run(worker.run, host, self._settings.port, heard))
        except asyncio.CancelledError:
            worker.submit(worker.stop)
            raise
        except Exception as error:
            context = {"message": "the UCX thread failed", "exception": error}
            asyncio.get_running_loop().call_exception_handler(context)
        finally:
            lane.close()
            worker.settle()

    def _accept(self, endpoint: Endpoint) -> None:
        link = UcxLink(self.worker, endpoint, self.counters, asyncio.get_running_loop())
        if self._full:
            self._reject()
            link.abort()
        else:
            self._welcome(link)

    def _reject(self) -> None:
        self.counters.refused_handshakes += 1

    async def connect(self, address: str, timeout: float) -> Connection:
        self._check_open()
        host, port = parse_address(self.scheme, address)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        async with asyncio.timeout_at(deadline):
            literal = await _resolve(host, port)
        link = UcxLink(self.worker, Endpoint(), self.counters, loop)
        link.connect(literal, port)
        return await self._introduce(link, deadline - loop.time())

    async def close(self) -> None:
        await self._close_links()
        if self._worker is not None and self._thread is not None:
            self._worker.submit(self._worker.stop)
            await asyncio.shield(self._thread)


async def _resolve(host: str, port: int) -> str:
    """A literal address: UCX takes no names."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectionClosed(f"cannot resolve {host}: {error}") from None
    return str(found[0][4][0])
