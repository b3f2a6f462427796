"""Turns the credits of a pull into frames.

    credit ──> slot ──> copy lane: gather, seal ──> send ──> slot free

One frame of a pull is packed at a time, while those before it are sent: a frame that were packed earlier could
have left the CPU's caches by the time that the transport reads it. The source is pinned while a gather reads its
blocks, and only then.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Final, Protocol

from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.schedule.step import BlockTable, KVStore
from kvferry.transport.base import Connection
from kvferry.transport.slots import Slot, SlotPool
from kvferry.wire.flow import Manifest, ManifestCodec
from kvferry.wire.frame import (
    HEADER_BYTES,
    KIND_KV,
    KIND_MANIFEST,
    KIND_PAD,
    NO_PIECE,
    FrameHeader,
    Piece,
    frame_tag,
    seal,
)
from kvferry.worker.handoff.outgoing import MANIFEST, PAD, Content, Outgoing
from kvferry.worker.metrics import WorkerMetrics

log = get_logger(__name__)
SEND_STALL: Final = 5.0


class Source(Protocol):
    """The sequence whose KV a pull wants."""

    @property
    def request_id(self) -> str:
        """For logs."""

    @property
    def block_table(self) -> BlockTable | None:
        """None: its blocks are gone."""

    @property
    def finished(self) -> bool:
        """Its first token is known: a manifest can be made."""

    def manifest(self, from_token: int, num_frames: int) -> Manifest: ...

    def pin(self) -> None: ...

    def unpin(self) -> None: ...


@dataclass(slots=True, eq=False)
class Outlet:
    """One connection that frames leave by, and the sends under way with the time they began, oldest first."""

    connection: Connection
    sends: dict[int, float] = field(default_factory=dict)  # by frame tag

    def is_stalled(self, moment: float) -> bool:
        """D has a receive for every frame: one that does not leave shows that D is frozen."""
        return bool(self.sends) and moment - next(iter(self.sends.values())) > SEND_STALL


class Flowing(Protocol):
    """A pull that is sent."""

    wake: asyncio.Event  # set when there may be something to send

    @property
    def link(self) -> Outlet: ...

    @property
    def listed(self) -> bool:
        """Its connection still knows it: credits may come."""


class Pump:
    """Sends the frames of all pulls. Only the event loop calls it."""

    def __init__(self, store: KVStore, slots: SlotPool, copy_lane: Lane, metrics: WorkerMetrics) -> None:
        self._store = store
        self._slots = slots
        self._copy_lane = copy_lane
        self._metrics = metrics
        self._manifests = ManifestCodec()

    async def run(self, pull: Flowing, outgoing: Outgoing, source: Source | None) -> None:
        """Use the pull's credits until it is over and all are used. Without a source there are but pads to send."""
        while not (outgoing.stopped and outgoing.credits == 0 and not pull.listed):
            item = outgoing.next(finished=source is not None and source.finished)
            if item is None:
                pull.wake.clear()
                await pull.wake.wait()
                continue
            try:
                await self._send_frame(pull.link, outgoing, source, *item)
            except Exception:
                # A frame that was counted will never come: only the end of the connection frees D's receive.
                log.exception("cannot send KV", request_id=source.request_id if source else None)
                self._metrics.transfer_failures.labels("gather").inc()
                pull.link.connection.abort()
                return

    async def _send_frame(
        self, link: Outlet, outgoing: Outgoing, source: Source | None, frame: int, content: Content
    ) -> None:
        slot = await self._slots.acquire(f"send {outgoing.pull_id}/{frame}")
        try:
            size = await self._fill(slot.view, outgoing, source, frame, content)
        except BaseException:
            self._slots.release(slot)
            raise
        self._send(link, slot, frame_tag(outgoing.pull_id, frame), size)

    async def _fill(
        self, view: memoryview, outgoing: Outgoing, source: Source | None, frame: int, content: Content
    ) -> int:
        """Make the frame in a slot; returns its size."""
        kv, pull_id = self._store.kv_format, outgoing.pull_id
        table = None if source is None else source.block_table
        if source is not None and table is not None:
            if isinstance(content, Piece):
                num_bytes = content.num_bytes(kv.head_dim, kv.dtype)
                header = FrameHeader(KIND_KV, pull_id, frame, content, kv.dtype, num_bytes)
                size = await self._gather(view, header, source, table)
                outgoing.num_bytes += num_bytes
                return size
            if content == MANIFEST:
                payload = self._manifests.encode(source.manifest(outgoing.from_token, frame))
                view[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
                return seal(view, FrameHeader(KIND_MANIFEST, pull_id, frame, NO_PIECE, kv.dtype, len(payload)))
        # Or its blocks are gone while this frame waited for a slot: the credit is still used up.
        assert content == PAD or table is None
        return seal(view, FrameHeader(KIND_PAD, pull_id, frame, NO_PIECE, kv.dtype, 0))

    async def _gather(self, view: memoryview, header: FrameHeader, source: Source, table: BlockTable) -> int:
        source.pin()
        try:
            size = await self._copy_lane.run(_pack, self._store, view, header, table.copy())
        finally:
            source.unpin()
        self._metrics.kv_bytes.labels("sent").inc(header.payload_bytes)
        if header.piece.layer_start == header.piece.head_start == 0:
            self._metrics.kv_tokens.labels("sent").inc(header.piece.num_tokens)
        return size

    def _send(self, link: Outlet, slot: Slot, tag: int, size: int) -> None:
        sending = link.connection.send(tag, slot.view[:size])
        link.sends[tag] = now()
        sending.add_done_callback(lambda _: link.sends.pop(tag))
        self._slots.lend(slot, sending)
        self._slots.release(slot)  # free when the send has completed


def _pack(store: KVStore, view: memoryview, header: FrameHeader, block_table: BlockTable) -> int:
    """On the copy lane: gather a piece and seal its frame."""
    payload = view[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
    store.gather(header.piece, block_table, payload)
    return seal(view, header)
