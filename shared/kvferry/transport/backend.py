"""What the transports of all backends share: admission, the handshake of both sides, the end of all links."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

from kvferry.errors import ConnectionClosed, SettingError
from kvferry.runtime import Runtime
from kvferry.transport.base import Connection, Transport, TransportCounters, TransportSettings
from kvferry.transport.hello import NONCE_BYTES, Handshake, Side
from kvferry.transport.link import Link


class Backend(Transport):
    """A transport of any backend."""

    def __init__(self, settings: TransportSettings, runtime: Runtime) -> None:
        if not settings.data_key:
            raise SettingError("data_key", "the data plane needs the cluster's key")
        self.counters = TransportCounters()
        self._settings = settings
        self._runtime = runtime
        self._links: dict[Link, None] = {}  # in order of creation; in handshake or open
        self._on_connection: Callable[[Connection], None] | None = None
        self._closed = False

    @property
    def num_connections(self) -> int:
        """Open ones and those in their handshake, both directions."""
        return len(self._links)

    @property
    def _full(self) -> bool:
        return self._closed or len(self._links) >= self._settings.max_connections

    def _adopt(self, link: Link) -> None:
        self._links[link] = None
        link.on_closed(lambda: self._forget(link))

    def _forget(self, link: Link) -> None:
        self._links.pop(link, None)

    def _handshake(self, side: Side) -> Handshake:
        settings = self._settings
        return Handshake(side, settings.data_key, settings.incarnation, self._runtime.random_bytes(NONCE_BYTES))

    def _welcome(self, link: Link) -> None:
        """Greet a peer that has connected to us, and hand it over once it has proved the data key."""

        def greeted(error: Exception | None) -> None:
            if error is None and self._on_connection is not None:
                self._on_connection(link)

        self._adopt(link)
        link.greet(self._handshake("acceptor"), self._settings.handshake_timeout, greeted)

    async def _introduce(self, link: Link, timeout: float) -> Link:
        """Greet a peer that we have connected to. Raises what `connect` may raise."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def greeted(error: Exception | None) -> None:
            if done.done():
                return
            if error is None:
                done.set_result(None)
            else:
                done.set_exception(error)

        self._adopt(link)
        link.greet(self._handshake("initiator"), timeout, greeted)
        try:
            await done
        except BaseException:
            link.abort()
            raise
        return link

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionClosed("this transport is closed")

    async def _close_links(self) -> None:
        self._closed = True
        await asyncio.gather(*(link.close() for link in list(self._links)))


def parse_address(scheme: str, address: str) -> tuple[str, int]:
    """Host and port of `scheme://host:port`. Raises `ConnectionClosed` for anything else: it comes from outside."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if host is None or port is None or parts.scheme != scheme:
        raise ConnectionClosed(f"{address!r} is no {scheme} address")
    return host, port


def format_address(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
