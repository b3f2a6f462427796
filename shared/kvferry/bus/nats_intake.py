"""The way of a plain message from the socket to its subscription, past nats-py's.

There a message passes a stream reader, a task that waits for it, a parser that tries each operation on a growing buffer
and three coroutines: on a gateway that streams, a quarter of what it does between a batch of tokens and its clients.
Here one call of the event loop takes all messages that have come whole. What is not one, or has come in part, goes
nats-py's way, and so does everything behind it until nats-py has nothing left: order is kept.

The protocol: docs.nats.io/reference/reference-protocols/nats-protocol, `MSG`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from typing import Final

# subject, subscription id, reply subject or None, size of the payload in bytes
_MSG: Final = re.compile(rb"MSG[ \t]+([^\s]+)[ \t]+([0-9]{1,18})[ \t]+(?:([^\s]+)[ \t]+)?([0-9]{1,18})\r\n")
_END: Final = 2  # bytes of the line end behind a payload

Deliver = Callable[[str, bytes, str, Mapping[str, str] | None], None]  # subject, payload, reply or "", headers


def _text(subject: bytes) -> str:
    return subject.decode("utf-8", "replace")


class Intake(asyncio.Protocol):
    """Stands between a connection and the protocol that nats-py gave it."""

    def __init__(self, behind: asyncio.Protocol, is_idle: Callable[[], bool], taps: Mapping[int, Deliver]) -> None:
        """`is_idle`: whether nats-py has taken all that it was given. `taps`: by subscription id."""
        self._behind = behind
        self._is_idle = is_idle
        self._taps = taps

    def data_received(self, data: bytes) -> None:
        if self._is_idle():
            taken = self._take(data)
            if taken == len(data):
                return
            data = data[taken:]
        self._behind.data_received(data)

    def _take(self, data: bytes) -> int:
        """Deliver the whole messages that `data` begins with. Returns the bytes of them."""
        taken = 0
        while (head := _MSG.match(data, taken)) is not None:
            subject, subscription_id, reply, size = head.groups()
            begin = head.end()
            end = begin + int(size)
            tap = self._taps.get(int(subscription_id))
            if tap is None or end + _END > len(data):
                break
            taken = end + _END
            # A subject that is no text is nobody's; to fail here would cost the connection.
            tap(_text(subject), data[begin:end], _text(reply) if reply else "", None)
        return taken

    def eof_received(self) -> bool | None:
        return self._behind.eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._behind.connection_lost(exc)

    def pause_writing(self) -> None:
        self._behind.pause_writing()

    def resume_writing(self) -> None:
        self._behind.resume_writing()
