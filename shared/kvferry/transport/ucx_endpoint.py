"""One connection as the UCX thread sees it, and who hears of it on the owner's loop.

    open ── close ──> draining ── all sends ended, BYE sent ──> leaving ──┐
      ├──── BYE has come ──> left ── receives under way ended ────────────┤
      └──── abort, failure ──────────────────────────────────────────────┴──> doomed
    doomed ── no callback is running: closed by force ──> closing ── all requests ended ──> gone

`ucx_endpoints.py` moves an endpoint along; its requests are in `ucx_requests.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from kvferry.errors import CorruptFrame
from kvferry.transport.link import Transfer

EndpointState = Literal["open", "draining", "leaving", "left", "doomed", "closing", "gone"]
ALIVE: Final[frozenset[EndpointState]] = frozenset(("open", "draining", "leaving", "left"))


class Owner(Protocol):
    """Who hears, on the owner's loop, what happens to one endpoint."""

    def arrived(self, message: memoryview) -> None:
        """A flow message, in order."""

    def violated(self) -> None:
        """The peer broke the protocol; the endpoint is closing."""

    def sent(self, transfer: Transfer[None] | None, num_bytes: int, status: int) -> None:
        """A flow message (no transfer) or a frame has left its buffer."""

    def received(self, transfer: Transfer[int], num_bytes: int, status: int) -> None:
        """A posted receive has ended."""

    def too_long(self, transfer: Transfer[int], error: CorruptFrame) -> None:
        """A posted receive met a frame that does not fit."""

    def lost(self) -> None:
        """The endpoint is closing; its buffers are still UCX's."""

    def gone(self) -> None:
        """Its buffers are free, and nothing more comes but answers to what is submitted too late."""

    def finish(self) -> None:
        """The answer to `confirm`."""


@dataclass(eq=False, slots=True)
class Endpoint:
    """One connection, as the thread sees it."""

    owner: Owner = field(init=False)  # set and used on the owner's loop alone
    handle: int = 0
    state: EndpointState = "open"
    num_sends: int = 0
    num_requests: int = 0  # UCX's, sends included
    next_sent: int = 0  # numbers of flow messages
    next_received: int = 0
    # The owner puts receives in, the thread takes them out: one atomic step each. So a frame that comes while
    # the thread is busy in UCX finds its receive without waiting for the queue of calls.
    posted: dict[int, tuple[memoryview, Transfer[int]]] = field(default_factory=dict)
