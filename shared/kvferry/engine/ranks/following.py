"""A follower's side of its channel: it loads what its leader tells it, and computes each step with it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final, Protocol, TypeAlias

import msgspec

from kvferry.engine.columns import Columns
from kvferry.engine.ranks.channel import MAX_CHANNEL_BYTES, Channel
from kvferry.engine.ranks.followers import Failed, Head, Ready, Setup, Step

_ORDERS: Final = msgspec.msgpack.Decoder(Step | Head)
_SETUP: Final = msgspec.msgpack.Decoder(Setup)


class Follower(Protocol):
    """The engine of a rank that is told what to compute. Every call is one that all ranks make."""

    @property
    def weight_bytes(self) -> int: ...

    def step(self, columns: Columns, *, head: bool) -> None: ...

    def head(self, rows: range) -> None: ...

    def close(self) -> None: ...


Load: TypeAlias = Callable[[Setup], Follower]  # raises what the leader's runner does


class Session:
    """A follower's side: one message of its leader's after the other."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._follower: Follower | None = None

    @property
    def has_loaded(self) -> bool:
        return self._follower is not None

    def hear(self, payload: bytes) -> bytes | None:
        """Do what is told. Returns what to answer, if anything; raises whatever goes wrong."""
        if self._follower is None:
            self._follower = self._load(_SETUP.decode(payload))
            return msgspec.msgpack.encode(Ready(self._follower.weight_bytes))
        match _ORDERS.decode(payload):
            case Step(columns, head):
                self._follower.step(Columns.read(columns), head=head)
            case Head(first, end):
                self._follower.head(range(first, end))
        return None

    def close(self) -> None:
        if self._follower is not None:
            self._follower.close()


def follow(channel: Channel, load: Load) -> None:
    """Do what the leader tells, until it ends the channel. Raises whatever goes wrong, which the leader hears while it
    waits for Ready: the process must then end."""
    session = Session(load)
    try:
        while (payload := channel.receive()) is not None:
            if (answer := session.hear(payload)) is not None:
                channel.send(answer)
    except Exception as error:
        if not session.has_loaded:
            channel.send(msgspec.msgpack.encode(Failed.of(error)))
        raise
    session.close()


class DirectChannel(Channel):
    """The leader's end of a channel within one thread, the twin of sockets and processes: a message is done when it
    has been sent. What the follower raises comes out there."""

    def __init__(self, load: Load) -> None:
        self._session: Session | None = Session(load)
        self._answers: deque[bytes] = deque()

    @property
    def ended(self) -> bool:
        return self._session is None

    def send(self, payload: bytes) -> None:
        if self._session is None:
            raise BrokenPipeError("the rank has ended")
        if (answer := self._session.hear(payload)) is not None:
            self._answers.append(answer)

    def receive(self, limit: int = MAX_CHANNEL_BYTES) -> bytes | None:
        return self._answers.popleft() if self._answers else None

    def end(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()
