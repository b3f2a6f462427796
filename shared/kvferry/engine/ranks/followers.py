"""The ranks of one tensor-parallel worker: a leader, and followers that compute every step with it.

    leader                                        follower
    Setup(engine, rank, settings)        ->         loads its shard of the weights
                                         <-         Ready(weight bytes), or Failed(why)
    Step, Head                           ->         computes it, together with all ranks
    ends the channel                     ->         ends

Messages are msgpack. Nothing is answered after Ready: the ranks wait for each other inside a step, in the engine's own
collective. A rank that fails ends its process, and with it its channel (`channel.py`). Then the leader can never end
its step, so the worker's process must end, too.

The ranks of one host share memory (`SharedMemory`) for what they exchange in a step, and for the KV of each, which the
leader copies into frames and out of them. A rank on another host exchanges over the network (`Exchange`), and its KV is
copied through a second channel (`copies.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from kvferry.engine.choice import EngineName
from kvferry.engine.columns import MAX_STEP_ROWS, ColumnsMessage
from kvferry.engine.ranks.channel import Channel
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.errors import CheckpointError, RankLost, SettingError

MAX_PROBLEM_CHARS: Final = 4096

RowNumber = Annotated[int, Meta(ge=0, le=MAX_STEP_ROWS)]


class Exchange(msgspec.Struct, frozen=True):
    """Where ranks that share no memory find each other: the store of `torch.distributed`, on the leader's host."""

    host: str
    port: int


class Setup(msgspec.Struct, frozen=True):
    """What a follower loads."""

    engine: EngineName | Literal["memory"]
    rank: int
    settings: Mapping[str, str | int | None]  # fields of EngineSettings
    exchange: Exchange | None = None  # None: all share memory
    # Of a rank on another host: the id of the leader's KV format, and what its part must be (`part.py`).
    format_id: str = ""
    part_id: str = ""


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


class Followers:
    """The leader's ends of the channels. One step at a time."""

    def __init__(
        self,
        memory: SharedMemory,
        channels: Sequence[Channel],
        copies: Mapping[int, Channel] | None = None,
        host: str = "",
    ) -> None:
        """`channels` [ranks - 1]: to rank 1, 2, …; `copies`: to those on other hosts, for their KV; `host`: where these
        see this one."""
        self.memory = memory
        self.host = host
        self._channels = tuple(channels)
        self._copies = dict(copies or {})
        self._copying = threading.Lock()

    @property
    def remote(self) -> Set[int]:
        """Ranks on other hosts."""
        return self._copies.keys()

    @property
    def size(self) -> int:
        """Ranks, the leader included."""
        return 1 + len(self._channels)

    def set_up(
        self,
        engine: EngineName | Literal["memory"],
        settings: Mapping[str, str | int | None],
        exchange: Exchange | None = None,
        format_id: str = "",
        part_ids: Mapping[int, str] | None = None,
    ) -> None:
        """Let them load. `part_ids`: of the ranks on other hosts. Raises `RankLost`."""
        part_ids = part_ids or {}
        assert part_ids.keys() == self._copies.keys()
        for rank, channel in enumerate(self._channels, 1):
            remote = (format_id, part_ids[rank]) if rank in self._copies else ()
            self._send(rank, channel, msgspec.msgpack.encode(Setup(engine, rank, settings, exchange, *remote)))

    def ready(self) -> list[int]:
        """Wait until all have loaded. Returns the bytes of their weights; raises the first one's failure."""
        sizes = []
        for rank, channel in enumerate(self._channels, 1):
            payload = channel.receive()
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
        step for good: the channels are ended, which ends the worker."""
        payload = msgspec.msgpack.encode(order)
        try:
            for rank, channel in enumerate(self._channels, 1):
                self._send(rank, channel, payload)
            yield
        except BaseException:
            self.close()
            raise

    def ask(self, rank: int, payload: bytes) -> bytes:
        """A message about the KV of a rank on another host, and its answer. May be called beside a step. Raises
        `RankLost`; then the channels are ended, which ends the worker."""
        channel = self._copies[rank]
        with self._copying:
            try:
                channel.send(payload)
                answer = channel.receive()
            except OSError:
                answer = None
        if answer is None:
            self.close()
            raise RankLost(rank, "its KV can no longer be copied")
        return answer

    def close(self) -> None:
        """End the channels, and with them the followers. May be called twice, and by any thread."""
        for channel in (*self._channels, *self._copies.values()):
            channel.end()

    def _send(self, rank: int, channel: Channel, payload: bytes) -> None:
        try:
            channel.send(payload)
        except OSError as error:
            raise RankLost(rank, str(error)) from None
