"""The ranks of one tensor-parallel worker: a leader, and followers that compute every step with it.

    leader                                        follower
    Setup(engine, rank, settings)        ->         loads its shard of the weights
                                         <-         Ready(weight bytes), or Failed(why)
    Step, Head                           ->         computes it, together with all ranks
    closes the channel                   ->         ends

A channel is a byte stream that keeps order and is closed when either end dies; messages are msgpack behind their
length. Nothing is answered after Ready: the ranks wait for each other inside a step, in the engine's own collective. A
rank that fails ends its process. Then the leader can never end its step, so the worker's process must end, too.

Channels could lead to other hosts. What the ranks share beside them can't: memory (`SharedMemory`) for what they
exchange in a step, and for the KV of each rank, which the leader copies into frames and out of them.
"""

from __future__ import annotations

import mmap
import os
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Final, Literal, Protocol

import msgspec
from msgspec import Meta

from kvferry.engine.choice import EngineName
from kvferry.engine.columns import MAX_STEP_ROWS, Columns, ColumnsMessage
from kvferry.errors import CheckpointError, MalformedMessage, RankLost, SettingError
from kvferry.runtime import shared_memory

MAX_CHANNEL_BYTES: Final = 64 << 20  # of one message between ranks
MAX_PROBLEM_CHARS: Final = 4096
_LENGTH: Final = struct.Struct("<I")

RowNumber = Annotated[int, Meta(ge=0, le=MAX_STEP_ROWS)]


class Setup(msgspec.Struct, frozen=True):
    """What a follower loads."""

    engine: EngineName
    rank: int
    settings: Mapping[str, str | int | None]  # fields of EngineSettings


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    weight_bytes: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """`subject`: a setting, or a file of the checkpoint."""

    kind: Literal["setting", "checkpoint", "other"]
    subject: str
    problem: Annotated[str, Meta(max_length=MAX_PROBLEM_CHARS)]

    @classmethod
    def of(cls, error: Exception) -> Failed:
        match error:
            case SettingError():
                return cls("setting", error.setting, error.problem[:MAX_PROBLEM_CHARS])
            case CheckpointError():
                return cls("checkpoint", error.path, error.problem[:MAX_PROBLEM_CHARS])
            case _:
                return cls("other", "", f"{type(error).__name__}: {error}"[:MAX_PROBLEM_CHARS])

    def error(self, rank: int) -> Exception:
        match self.kind:
            case "setting":
                return SettingError(self.subject, self.problem)
            case "checkpoint":
                return CheckpointError(self.subject, self.problem)
            case _:
                return RankLost(rank, self.problem)


class Step(msgspec.Struct, frozen=True, tag="step", array_like=True):
    columns: ColumnsMessage
    head: bool  # the wanted logits are computed in the step


class Head(msgspec.Struct, frozen=True, tag="head", array_like=True):
    """Logits of some wanted rows of the last step, which had none."""

    first: RowNumber
    end: RowNumber


_REPORTS: Final = msgspec.msgpack.Decoder(Ready | Failed)
_ORDERS: Final = msgspec.msgpack.Decoder(Step | Head)
_SETUP: Final = msgspec.msgpack.Decoder(Setup)


class Follower(Protocol):
    """The engine of a rank that is told what to compute. Every call is one that all ranks make."""

    @property
    def weight_bytes(self) -> int: ...

    def step(self, columns: Columns, *, head: bool) -> None: ...

    def head(self, rows: range) -> None: ...

    def close(self) -> None: ...


class SharedMemory:
    """Anonymous memory files that all ranks of a worker map: what they exchange, and the KV cache of each rank.

    They live as long as a process holds their descriptors or has mapped them. Linux.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        """Of what is exchanged, then of the caches by rank. They are this object's to close."""
        self.descriptors: Final = tuple(descriptors)

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """For `size` ranks."""
        return cls([os.memfd_create(name) for name in ("kvferry-exchange", *("kvferry-kv" for _ in range(size)))])

    def exchange(self, num_bytes: int) -> mmap.mmap:
        return shared_memory(self.descriptors[0], num_bytes)

    def cache(self, rank: int, num_bytes: int) -> mmap.mmap:
        return shared_memory(self.descriptors[1 + rank], num_bytes)

    def close(self) -> None:
        """Close the descriptors. What is mapped stays."""
        for descriptor in self.descriptors:
            os.close(descriptor)


class Followers:
    """The leader's ends of the channels. One step at a time."""

    def __init__(self, memory: SharedMemory, channels: Sequence[socket.socket]) -> None:
        """`channels` [ranks - 1], blocking: of rank 1, 2, …"""
        self.memory = memory
        self._channels = tuple(channels)

    @property
    def size(self) -> int:
        """Ranks, the leader included."""
        return 1 + len(self._channels)

    def set_up(self, engine: EngineName, settings: Mapping[str, str | int | None]) -> None:
        """Let them load. Raises `RankLost`."""
        for rank, channel in enumerate(self._channels, 1):
            self._send(rank, channel, msgspec.msgpack.encode(Setup(engine, rank, settings)))

    def ready(self) -> list[int]:
        """Wait until all have loaded. Returns the bytes of their weights; raises the first one's failure."""
        sizes = []
        for rank, channel in enumerate(self._channels, 1):
            payload = receive(channel)
            if payload is None:
                raise RankLost(rank, "ended while it loaded")
            report = _REPORTS.decode(payload)
            if isinstance(report, Failed):
                raise report.error(rank)
            sizes.append(report.weight_bytes)
        return sizes

    @contextmanager
    def told(self, order: Step | Head) -> Iterator[None]:
        """Tell all ranks what to compute; inside, the leader computes its own part. If that fails the ranks are out of
        step for good: the channels are closed, which ends the worker."""
        payload = msgspec.msgpack.encode(order)
        try:
            for rank, channel in enumerate(self._channels, 1):
                self._send(rank, channel, payload)
            yield
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the channels, and with them the followers. May be called twice, and by any thread."""
        for channel in self._channels:
            try:
                channel.shutdown(socket.SHUT_RDWR)
            except OSError:  # the other end is gone
                continue

    def _send(self, rank: int, channel: socket.socket, payload: bytes) -> None:
        try:
            send(channel, payload)
        except OSError as error:
            raise RankLost(rank, str(error)) from None


def await_setup(channel: socket.socket) -> Setup | None:
    """A follower's first message; None if the leader is gone."""
    payload = receive(channel)
    return None if payload is None else _SETUP.decode(payload)


def follow(channel: socket.socket, follower: Follower) -> None:
    """Do what the leader tells, until it closes the channel. Raises whatever goes wrong: the process must then end."""
    send(channel, msgspec.msgpack.encode(Ready(follower.weight_bytes)))
    while (payload := receive(channel)) is not None:
        match _ORDERS.decode(payload):
            case Step(columns, head):
                follower.step(Columns.read(columns), head=head)
            case Head(first, end):
                follower.head(range(first, end))


def send(channel: socket.socket, payload: bytes) -> None:
    """Raises OSError if the other end is gone."""
    if len(payload) > MAX_CHANNEL_BYTES:
        raise RuntimeError(f"a message of {len(payload)} bytes between ranks")
    channel.sendall(_LENGTH.pack(len(payload)) + payload)


def receive(channel: socket.socket) -> bytes | None:
    """The next message; None once the other end is gone. Raises `MalformedMessage` for one beyond the limit."""
    head = _exactly(channel, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_CHANNEL_BYTES:
        raise MalformedMessage(f"{length} bytes, limit {MAX_CHANNEL_BYTES}")
    return _exactly(channel, length)


def _exactly(channel: socket.socket, count: int) -> bytes | None:
    content = bytearray(count)
    view = memoryview(content)
    while view:
        try:
            received = channel.recv_into(view)
        except ConnectionError:
            return None
        if not received:
            return None
        view = view[received:]
    return bytes(content)
