"""How a leader reaches a follower: messages that keep their order, until either end is gone."""

from __future__ import annotations

import socket
import struct
from abc import ABC, abstractmethod
from typing import Final

from kvferry.errors import MalformedMessage

MAX_CHANNEL_BYTES: Final = 65 << 20  # of one message between ranks: a KV frame and what goes with it
_LENGTH: Final = struct.Struct("<I")


class Channel(ABC):
    """One end. A thread may send while another one receives, and any may end it."""

    @abstractmethod
    def send(self, payload: bytes) -> None:
        """Raises OSError if the other end is gone, RuntimeError for a message beyond the limit."""

    @abstractmethod
    def receive(self, limit: int = MAX_CHANNEL_BYTES) -> bytes | None:
        """The next message; None once the other end is gone. Raises `MalformedMessage` for one beyond the limit."""

    @abstractmethod
    def end(self) -> None:
        """Both ends hear it, also where they wait. May be called twice."""


class SocketChannel(Channel):
    """Over a stream socket that blocks: a pair within a host, or TCP. Each message stands behind its length."""

    def __init__(self, connected: socket.socket) -> None:
        """`connected` is this object's to close."""
        self._socket = connected

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def host(self) -> str:
        """Of this end, over TCP."""
        return str(self._socket.getsockname()[0])

    def send(self, payload: bytes) -> None:
        if len(payload) > MAX_CHANNEL_BYTES:
            raise RuntimeError(f"a message of {len(payload)} bytes between ranks")
        self._socket.sendall(_LENGTH.pack(len(payload)), socket.MSG_MORE)
        self._socket.sendall(payload)

    def receive(self, limit: int = MAX_CHANNEL_BYTES) -> bytes | None:
        head = self._exactly(_LENGTH.size)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if length > limit:
            raise MalformedMessage(f"{length} bytes, limit {limit}")
        return self._exactly(length)

    def end(self) -> None:
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other end is gone
            return

    def detach(self) -> socket.socket:
        """The socket, from here on the caller's."""
        return socket.socket(fileno=self._socket.detach())

    def close(self) -> None:
        """End it and free its descriptor, unless it was detached. Nothing may be called afterwards."""
        self.end()
        self._socket.close()

    def _exactly(self, count: int) -> bytes | None:
        content = bytearray(count)
        view = memoryview(content)
        while view:
            try:
                received = self._socket.recv_into(view)
            except ConnectionError:
                return None
            if not received:
                return None
            view = view[received:]
        return bytes(content)
