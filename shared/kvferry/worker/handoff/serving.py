"""The parts of pulls that one shard of a prefill worker sends. What is sent when is its leader's to say (`orders.py`).

    FetchPart ──> asked ──Serve──> sending ──Ack, Abort, Stop, connection lost──> over
                    └── Stop: the leader knows no such pull ──> over

A part is over for its leader as soon as no copy reads the blocks. D's shard may have credits under way then, which are
padded until it has confirmed that no more follow.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import msgspec
import numpy as np

from kvferry.lane import Lane
from kvferry.runtime import TaskSet
from kvferry.schedule.step import BlockTable, KVStore
from kvferry.transport.slots import SlotPool
from kvferry.wire.flow import Abort, Aborted, Ack, Credit, FetchPart, Flow, FlowCodec, Manifest
from kvferry.wire.frame import HEADER_BYTES
from kvferry.worker.handoff.hearing import Hearing
from kvferry.worker.handoff.orders import AbortReason, Asked, Computed, Finish, Serve, Served, Stop
from kvferry.worker.handoff.outgoing import Outgoing
from kvferry.worker.handoff.pump import Outlet, Pump
from kvferry.worker.metrics import WorkerMetrics

MAX_CREDITS_HELD: Final = 256  # of one pull
MAX_PULLS: Final = 4096  # of one connection, those that wait for D's confirmation included


class PartServer:
    """Only the event loop calls it."""

    def __init__(
        self,
        store: KVStore,
        slots: SlotPool,
        copy_lane: Lane,
        tasks: TaskSet,
        metrics: WorkerMetrics,
        tell: Callable[[Asked | Served], None],
    ) -> None:
        """`tell`: the leader."""
        self._kv_format = store.kv_format
        self._heads = store.heads
        self._room = slots.slot_bytes - HEADER_BYTES
        self._pump = Pump(store, slots, copy_lane, metrics)
        self._tasks = tasks
        self._metrics = metrics
        self._tell = tell
        self._codec = FlowCodec()
        self._hearing = Hearing(metrics)
        self._last_part = 0
        self._parts: dict[int, _Part] = {}  # that the leader has not heard to be over

    def __len__(self) -> int:
        return len(self._parts)

    # -- what D's shards say ---------------------------------------------------------------------------------

    def take(self, link: PartLink, message: FetchPart | Credit | Abort | Ack) -> None:
        if isinstance(message, FetchPart):
            self._on_fetch(link, message)
        elif (part := link.parts.get(message.pull_id)) is not None:
            self._on_part(part, message)

    def _on_fetch(self, link: PartLink, message: FetchPart) -> None:
        heads = range(*message.heads)
        known = message.pull_id in link.parts or len(link.parts) >= MAX_PULLS
        if known or not heads or heads.start not in self._heads or heads.stop - 1 not in self._heads:
            self._hearing.distrust(link.connection, "reused_pull" if known else "refused")
            return
        self._last_part += 1
        outgoing = Outgoing(message.pull_id, message.from_token, heads, message.credits)
        part = _Part(link, self._last_part, outgoing, self._maybe_over)
        self._parts[part.number] = link.parts[message.pull_id] = part
        self._tasks.spawn(self._pump.run(part, outgoing, part), "pump")
        self._tell(Asked(part.number, message.pull_id, message.ticket, message.attempt, message.from_token))

    def _on_part(self, part: _Part, message: Credit | Abort | Ack) -> None:
        outgoing = part.outgoing
        match message:
            case Credit(_, credits, again):
                fits = outgoing.credits + credits <= MAX_CREDITS_HELD
                if not outgoing.stopped and not (fits and outgoing.ask_again(again)):
                    self._metrics.wire_errors.labels("data", "refused").inc()
                    self._abort(part, "refused")
                outgoing.credits = min(MAX_CREDITS_HELD, outgoing.credits + credits)
            case Abort():
                if not outgoing.stopped:
                    self._abort(part, "asked")
                del part.link.parts[outgoing.pull_id]
            case Ack():
                self._stop(part)
                del part.link.parts[outgoing.pull_id]
        part.wake.set()

    def closed(self, link: PartLink) -> None:
        """The connection has ended."""
        parts, link.parts = list(link.parts.values()), {}
        for part in parts:
            part.outgoing.credits = 0
            self._stop(part)
            part.wake.set()

    # -- what the leader says --------------------------------------------------------------------------------

    def hear(self, order: Serve | Computed | Finish | Stop) -> None:
        part = self._parts.get(order.part)
        if part is None:
            return  # it was over while the order was on its way
        match order:
            case Serve(_, blocks, num_computed, request_id):
                part.request_id = request_id
                part.block_table = np.frombuffer(blocks, "<i4")
                part.outgoing.computed(num_computed, self._kv_format, self._room)
            case Computed(_, num_computed):
                part.outgoing.computed(num_computed, self._kv_format, self._room)
            case Finish(_, manifest):
                part.told = manifest
            case Stop(_, reason):
                if not part.outgoing.stopped:
                    self._abort(part, reason)
        part.wake.set()

    def _abort(self, part: _Part, reason: AbortReason) -> None:
        self._stop(part)
        message: Flow = Aborted(part.outgoing.pull_id, part.outgoing.next_frame, reason)
        part.link.connection.send_message(self._codec.encode(message))

    def _stop(self, part: _Part) -> None:
        part.outgoing.stopped = True
        part.block_table = None
        self._maybe_over(part)

    def _maybe_over(self, part: _Part) -> None:
        if part.outgoing.stopped and not part.num_copies and self._parts.pop(part.number, None) is not None:
            self._tell(Served(part.number, part.outgoing.num_bytes))


@dataclass(slots=True, eq=False)
class PartLink(Outlet):
    """A connection of a shard of D, and the parts on it by pull."""

    parts: dict[int, _Part] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Part:
    """Implements `Flowing` and `Source`."""

    link: PartLink
    number: int
    outgoing: Outgoing
    copied: Callable[[_Part], None]
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    request_id: str = ""
    block_table: BlockTable | None = None  # from Serve until it is stopped
    told: Manifest | None = None  # from Finish on
    num_copies: int = 0  # that read the blocks now

    @property
    def listed(self) -> bool:
        return self.link.parts.get(self.outgoing.pull_id) is self

    @property
    def finished(self) -> bool:
        return self.told is not None

    def manifest(self, from_token: int, num_frames: int) -> Manifest:
        assert self.told is not None
        return msgspec.structs.replace(self.told, num_frames=num_frames)

    def pin(self) -> None:
        self.num_copies += 1

    def unpin(self) -> None:
        self.num_copies -= 1
        self.copied(self)
