"""The contract of the control-plane bus. `nats.py` and `memory.py` implement it; one test suite runs over both.

- Any message may be lost, doubled, late or reordered; the layers above repair it.
- Reconnects for ever, after 0.1 to 1 s with jitter. While disconnected, `publish` and `request` raise
  `BusUnavailable`: nothing is kept to be replayed stale.
- Handlers are plain functions, called on the event loop, one message after the other in order of arrival
  within a subscription. A handler that raises is logged and counted; the subscription goes on.
- An overfull subscription drops messages and counts them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvferry.errors import BusError

MESSAGE_OVERHEAD: Final = 1 << 20  # bytes of a message beyond its tokens


class PayloadTooLarge(BusError):
    """A message over the server's max_payload. Nothing was sent."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"message of {size} bytes, the server takes {limit}")
        self.size = size
        self.limit = limit


class InvalidSubject(BusError):
    """A subject or pattern that NATS would not take. Nothing was sent."""

    def __init__(self, subject: str) -> None:
        super().__init__(f"invalid subject {subject[:128]!r}")
        self.subject = subject


class BusMessage(ABC):
    """One received message."""

    subject: str
    payload: bytes

    @abstractmethod
    async def respond(self, payload: bytes) -> None:
        """Answer a request. Without effect if the message is no request. Raises `BusUnavailable`."""


Handler = Callable[[BusMessage], None]


class Subscription(ABC):
    @abstractmethod
    async def close(self) -> None:
        """No handler call starts after this returns."""


@dataclass(slots=True)
class BusCounters:
    dropped: int = 0  # overfull subscriptions
    handler_errors: int = 0
    reconnects: int = 0


class Bus(ABC):
    """One connection to the control plane."""

    counters: BusCounters

    @property
    @abstractmethod
    def connected(self) -> bool: ...

    @property
    @abstractmethod
    def max_payload(self) -> int:
        """Bytes of the largest message that the server takes. Valid once connected."""

    @abstractmethod
    def on_change(self, listener: Callable[[bool], None]) -> None:
        """Call `listener(connected)` on the loop at every loss and return of the connection."""

    @abstractmethod
    async def start(self) -> None:
        """Connect. Raises `BusUnavailable` if the first connection fails, naming the setting."""

    @abstractmethod
    async def subscribe(self, subject: str, handler: Handler) -> Subscription:
        """Returns when the server is known to deliver (confirmed by a round trip). `*` and `>` as in NATS.

        Lives on over reconnects. Raises `BusUnavailable` while disconnected, `InvalidSubject`.
        """

    @abstractmethod
    async def publish(self, subject: str, payload: bytes) -> None:
        """Raises `BusUnavailable` while disconnected, `PayloadTooLarge`, `InvalidSubject`."""

    @abstractmethod
    async def request(self, subject: str, payload: bytes, timeout: float) -> bytes:
        """One answer, within `timeout` seconds.

        Raises `NoResponders`, `BusTimeout` or `BusUnavailable`, and what `publish` raises.
        """

    @abstractmethod
    async def close(self) -> None:
        """Flush what was published, then disconnect. May be called again; the bus cannot be started anew."""


@dataclass(frozen=True, slots=True)
class BusSettings:
    """How to reach NATS. `name` shows in the server's connection list."""

    url: str  # of one server, or of several of one cluster with commas between
    name: str
    inbox_prefix: str
    user: str = ""
    password: str = field(default="", repr=False)
    token: str = field(default="", repr=False)
    tls_ca: str = ""  # PEM files; with an authority, or a URL of the scheme tls, nothing is said without TLS
    tls_cert: str = ""  # our own, for a server that asks for one
    tls_key: str = ""
    min_payload: int = 0  # start fails if the server's max_payload is smaller


def least_payload(max_model_len: int) -> int:
    """The max_payload that a server must have for contexts of so many tokens (`BusSettings.min_payload`)."""
    return 4 * max_model_len + MESSAGE_OVERHEAD
