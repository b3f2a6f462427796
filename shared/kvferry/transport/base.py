"""The contract of the data plane. `ucx.py`, `tcp.py` and `memory.py` implement it; one test suite runs over all.

A connection carries two things between two workers:
- flow messages: at most `MAX_FLOW_BYTES` each, delivered in order to one handler;
- frames: bytes sent under a 64-bit tag into a buffer that the receiver posted under the same tag. A tag is
  never reused on a connection. Frames are sent only when the peer is known to have posted the receive.

Rules that every backend keeps:
- All methods are called on the event loop of the owner, all callbacks and futures run there.
- A buffer belongs to the transport from `receive`/`send` until its future is done, also when the
  connection is closed meanwhile: `abort` and `close` do not free buffers, the futures do. A future is done
  only when no byte can be written to (or read from) the buffer any more.
- When the connection ends, every pending future ends with `ConnectionClosed`, then `on_closed` runs, once.
- Completion of a send is not delivery.
- No deadline lives here: a frozen peer is the caller's business.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(slots=True)
class TransportCounters:
    refused_handshakes: int = 0
    protocol_errors: int = 0  # garbage, oversize, a frame that nobody posted
    sent_bytes: int = 0
    received_bytes: int = 0


class Connection(ABC):
    """One authenticated connection to a peer. `peer_incarnation` comes from its hello."""

    peer_incarnation: int

    @property
    @abstractmethod
    def closed(self) -> bool: ...

    @abstractmethod
    def on_message(self, handler: Callable[[memoryview], None]) -> None:
        """Set the flow handler. Messages that came before are delivered first. The view is valid only
        during the call."""

    @abstractmethod
    def on_closed(self, handler: Callable[[], None]) -> None:
        """Called once, on the loop; at once (through call_soon) if it is closed already."""

    @abstractmethod
    def send_message(self, message: bytes) -> None:
        """Queue a flow message, in order. Without effect once closed."""

    @abstractmethod
    def send(self, tag: int, frame: memoryview) -> asyncio.Future[None]:
        """Send a contiguous buffer. Done when the buffer may be used again."""

    @abstractmethod
    def receive(self, tag: int, buffer: memoryview) -> asyncio.Future[int]:
        """Post a contiguous writable buffer; done with the number of bytes that came. A frame longer than
        the buffer ends with `CorruptFrame("long")`; the connection lives on."""

    @abstractmethod
    def abort(self) -> None:
        """End now; what is queued may be lost."""

    @abstractmethod
    async def close(self) -> None:
        """Flush flow messages and sends under way, then end. Waits at most 1 s."""


class Transport(ABC):
    """One backend instance of one process."""

    scheme: str
    counters: TransportCounters

    @property
    @abstractmethod
    def address(self) -> str:
        """What a peer gives to `connect`. Valid after `start`."""

    @abstractmethod
    async def start(self, on_connection: Callable[[Connection], None]) -> None:
        """Listen. `on_connection` gets peers whose hello proved the data key. Raises `TransportUnavailable`."""

    @abstractmethod
    async def connect(self, address: str, timeout: float) -> Connection:
        """Raises `ConnectionClosed`, `HandshakeRefused` or TimeoutError."""

    @abstractmethod
    async def close(self) -> None:
        """End all connections and the listener; every buffer is free afterwards."""


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """What a backend needs to start. `host` is bound, `advertise_host` is what others are told."""

    incarnation: int
    data_key: bytes
    host: str = "127.0.0.1"
    advertise_host: str = "127.0.0.1"
    port: int = 0  # 0: any free port
    net_devices: str = "lo"  # UCX_NET_DEVICES
    max_connections: int = 256
    handshake_timeout: float = 3.0
