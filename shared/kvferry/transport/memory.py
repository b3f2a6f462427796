"""The data plane within one process, for tests and for the simulated cluster.

A `MemoryNetwork` carries everything between the transports that share it, on one event loop, through
`call_soon` and `call_later` alone: on a virtual clock a run is a function of its seed. It can be told to
corrupt, shorten or lengthen frames, to delay, cut and freeze, and to kill a process. Delivery between two
ends keeps its order, as the contract asks; faults that the contract excludes cannot be injected.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.errors import ConnectionClosed, CorruptFrame, TransportUnavailable
from kvferry.runtime import Runtime
from kvferry.transport.backend import Backend
from kvferry.transport.base import Connection, TransportCounters, TransportSettings
from kvferry.transport.link import Link, Transfer

Spoil = Callable[[bytearray], None]  # changes a frame's bytes, or its length, in place


@dataclass(slots=True)
class _Item:
    """One thing under way from one end to the other."""

    tag: int | None  # None: a flow message
    payload: bytes | memoryview
    transfer: Transfer[None] | None = None
    end: bool = False  # the sender has ended the connection


class MemoryNetwork:
    """Connects transports by name, and breaks what it is told to break."""

    def __init__(self) -> None:
        self.delay: Callable[[], float] = lambda: 0.0  # seconds on the way, drawn for each delivery
        self._hosts: dict[str, MemoryTransport] = {}
        self._pipes: list[MemoryLink] = []
        self._frozen: dict[str, None] = {}
        self._spoils: deque[Spoil] = deque()

    # Faults

    def spoil_next_frame(self, spoil: Spoil) -> None:
        """Let `spoil` change the next frame that is delivered anywhere."""
        self._spoils.append(spoil)

    def cut(self, one: str, other: str) -> None:
        """End all connections between two processes, as a broken link does."""
        for link in list(self._pipes):
            if {link.here, link.there} == {one, other}:
                link.break_off()

    def freeze(self, name: str) -> None:
        """Hold all that goes to or comes from a process, as SIGSTOP does: nobody is told."""
        self._frozen[name] = None

    def thaw(self, name: str) -> None:
        self._frozen.pop(name, None)
        for link in list(self._pipes):
            if name in (link.here, link.there):
                link.schedule()

    def kill(self, name: str) -> None:
        """End a process: its name cannot be reached and its connections break."""
        self._hosts.pop(name, None)
        for link in list(self._pipes):
            if name in (link.here, link.there):
                link.break_off()

    # What transports and links use

    def attach(self, name: str, transport: MemoryTransport) -> None:
        if name in self._hosts:
            raise TransportUnavailable("memory", f"the name {name} is taken")
        self._hosts[name] = transport

    def detach(self, name: str, transport: MemoryTransport) -> None:
        if self._hosts.get(name) is transport:
            del self._hosts[name]

    def find(self, name: str) -> MemoryTransport | None:
        return self._hosts.get(name)

    def is_frozen(self, *names: str) -> bool:
        return any(name in self._frozen for name in names)

    def spoil(self, frame: memoryview) -> bytes | memoryview:
        """The frame as it arrives."""
        if not self._spoils:
            return frame
        changed = bytearray(frame)
        self._spoils.popleft()(changed)
        return bytes(changed)

    def add(self, link: MemoryLink) -> None:
        self._pipes.append(link)

    def remove(self, link: MemoryLink) -> None:
        if link in self._pipes:
            self._pipes.remove(link)


class MemoryLink(Link):
    """One end. It holds what is under way to the other end."""

    def __init__(
        self, network: MemoryNetwork, here: str, there: str, counters: TransportCounters,
        loop: asyncio.AbstractEventLoop,
    ) -> None:  # fmt: skip
        super().__init__(counters, loop)
        self.here = here
        self.there = there
        self.peer: MemoryLink | None = None
        self._network = network
        self._way: deque[_Item] = deque()
        self._due: asyncio.Handle | None = None
        self._posted: dict[int, tuple[memoryview, Transfer[int]]] = {}
        network.add(self)

    def _transmit(self, message: bytes) -> None:
        self._put(_Item(None, message))

    def _send_frame(self, tag: int, frame: memoryview, transfer: Transfer[None]) -> None:
        self._put(_Item(tag, frame, transfer))

    def _post_receive(self, tag: int, buffer: memoryview, transfer: Transfer[int]) -> None:
        if tag in self._posted:
            raise ValueError(f"a receive is posted under tag {tag}")
        self._posted[tag] = (buffer, transfer)

    def _put(self, item: _Item) -> None:
        self._way.append(item)
        self.schedule()

    def schedule(self) -> None:
        """See to it that the oldest item under way arrives."""
        if self._due is None and self._way and not self._network.is_frozen(self.here, self.there):
            delay = self._network.delay()
            arrive = self._arrive
            self._due = self._loop.call_later(delay, arrive) if delay > 0 else self._loop.call_soon(arrive)

    def _arrive(self) -> None:
        self._due = None
        if not self._way or self._network.is_frozen(self.here, self.there):
            return
        item = self._way.popleft()
        peer = self.peer
        assert peer is not None
        if item.end:
            peer.break_off()
            self.break_off()
            return
        self._counters.sent_bytes += len(item.payload)
        if item.tag is None:
            peer.arrived(memoryview(item.payload))
        else:
            peer._take_frame(item.tag, self._network.spoil(memoryview(item.payload)))
        if item.transfer is not None:
            item.transfer.succeed(None)
        self.schedule()

    def _take_frame(self, tag: int, frame: bytes | memoryview) -> None:
        if self._finished:
            return
        posted = self._posted.pop(tag, None)
        if posted is None:
            self.violated()
            return
        buffer, transfer = posted
        if len(frame) > len(buffer):
            transfer.fail(CorruptFrame("long", f"{len(frame)} bytes into {len(buffer)}"))
            return
        buffer[: len(frame)] = frame
        self._counters.received_bytes += len(frame)
        transfer.succeed(len(frame))

    def _drain(self) -> None:
        self._put(_Item(None, b"", end=True))

    def _tear_down(self) -> None:
        """The peer hears of it after the network's delay, with nothing of what was under way."""
        self._let_go()
        self._way.append(_Item(None, b"", end=True))
        self.schedule()
        self.finish()

    def break_off(self) -> None:
        """End this side without telling the other."""
        if not self._finished:
            self._closing = True
            self._let_go()
            self.finish()
        self._network.remove(self)

    def _let_go(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        error = ConnectionClosed("the connection has ended")
        for _, posted in self._posted.values():
            posted.fail(error)
        for item in self._way:
            if item.transfer is not None:
                item.transfer.fail(error)
        self._posted.clear()
        self._way.clear()


class MemoryTransport(Backend):
    """The process called `name` on a network."""

    scheme = "memory"

    def __init__(self, settings: TransportSettings, runtime: Runtime, network: MemoryNetwork, name: str) -> None:
        super().__init__(settings, runtime)
        self._network = network
        self._name = name

    @property
    def address(self) -> str:
        return f"{self.scheme}://{self._name}"

    async def start(self, on_connection: Callable[[Connection], None]) -> None:
        self._on_connection = on_connection
        self._network.attach(self._name, self)

    async def connect(self, address: str, timeout: float) -> Connection:
        self._check_open()
        scheme, _, name = address.partition("://")
        host = self._network.find(name)
        if scheme != self.scheme or host is None:
            raise ConnectionClosed(f"nobody listens at {address!r}")
        loop = asyncio.get_running_loop()
        link = MemoryLink(self._network, self._name, name, self.counters, loop)
        peer = MemoryLink(self._network, name, self._name, host.counters, loop)
        link.peer, peer.peer = peer, link
        host.admit(peer)
        return await self._introduce(link, timeout)

    def admit(self, link: MemoryLink) -> None:
        if self._full:
            self.counters.refused_handshakes += 1
            link.abort()
        else:
            self._welcome(link)

    async def close(self) -> None:
        self._network.detach(self._name, self)
        await self._close_links()
