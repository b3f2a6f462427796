"""Turns the credits of a pull into frames.

    credit ──> slot ──> copy lane: gather, seal ──> send ──> slot free

One frame of a pull is packed at a time, while those before it are sent: a frame that were packed earlier could
have left the CPU's caches by the time that the transport reads it. The sequence is pinned while a gather reads its
blocks, and only then.
"""

from __future__ import annotations

from collections.abc import Callable

from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.schedule.step import BlockTable, ModelRunner
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
from kvferry.wire.logprobs import pack_logprobs
from kvferry.worker.metrics import WorkerMetrics
from kvferry_prefill.outgoing import MANIFEST, PAD, Content, Outgoing
from kvferry_prefill.pull import Pull
from kvferry_prefill.scheduler import PrefillScheduler

log = get_logger(__name__)


class Pump:
    """Sends the frames of all pulls. Only the event loop calls it."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        runner: ModelRunner,
        slots: SlotPool,
        copy_lane: Lane,
        metrics: WorkerMetrics,
        unpin: Callable[[Sequence], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._slots = slots
        self._copy_lane = copy_lane
        self._metrics = metrics
        self._unpin = unpin
        self._manifests = ManifestCodec()
        self.computed_at: dict[Key, float] = {}  # when the last step of a held sequence had ended

    async def run(self, pull: Pull, outgoing: Outgoing, sequence: Sequence | None) -> None:
        """Use the pull's credits until it is over and all are used. Without a sequence there are but pads to send."""
        while not (outgoing.stopped and outgoing.credits == 0 and not pull.listed):
            item = outgoing.next(finished=pull.key in self._scheduler.first_tokens)
            if item is None:
                pull.wake.clear()
                await pull.wake.wait()
                continue
            try:
                await self._send_frame(pull, outgoing, sequence, *item)
            except Exception:
                # A frame that was counted will never come: only the end of the connection frees D's receive.
                log.exception("cannot send KV", request_id=sequence.work.request_id if sequence else None)
                self._metrics.transfer_failures.labels("gather").inc()
                pull.link.connection.abort()
                return

    async def _send_frame(
        self, pull: Pull, outgoing: Outgoing, sequence: Sequence | None, frame: int, content: Content
    ) -> None:
        slot = await self._slots.acquire(f"send {pull.pull_id}/{frame}")
        try:
            size = await self._fill(slot.view, pull, outgoing, sequence, frame, content)
        except BaseException:
            self._slots.release(slot)
            raise
        self._send(pull, slot, frame, size)

    async def _fill(
        self, view: memoryview, pull: Pull, outgoing: Outgoing, sequence: Sequence | None, frame: int, content: Content
    ) -> int:
        """Make the frame in a slot; returns its size."""
        kv = self._runner.kv_format
        held = sequence if sequence and self._scheduler.sequences.get(sequence.key) is sequence else None
        if held and isinstance(content, Piece):
            num_bytes = content.num_bytes(kv.head_dim, kv.dtype)
            header = FrameHeader(KIND_KV, pull.pull_id, frame, content, kv.dtype, num_bytes)
            return await self._gather(view, header, held)
        if held and content == MANIFEST:
            payload = self._manifests.encode(self._manifest(outgoing, held, frame))
            view[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
            return seal(view, FrameHeader(KIND_MANIFEST, pull.pull_id, frame, NO_PIECE, kv.dtype, len(payload)))
        # Or its blocks are gone while this frame waited for a slot: the credit is still used up.
        assert content == PAD or not held
        return seal(view, FrameHeader(KIND_PAD, pull.pull_id, frame, NO_PIECE, kv.dtype, 0))

    async def _gather(self, view: memoryview, header: FrameHeader, sequence: Sequence) -> int:
        self._scheduler.memory.pin(sequence)
        try:
            size = await self._copy_lane.run(_pack, self._runner, view, header, sequence.block_table.copy())
        finally:
            self._unpin(sequence)
        self._metrics.kv_bytes.labels("sent").inc(header.payload_bytes)
        if header.piece.layer_start == 0:
            self._metrics.kv_tokens.labels("sent").inc(header.piece.num_tokens)
        return size

    def _send(self, pull: Pull, slot: Slot, frame: int, size: int) -> None:
        tag, sends = frame_tag(pull.pull_id, frame), pull.link.sends
        sending = pull.link.connection.send(tag, slot.view[:size])
        sends[tag] = now()
        sending.add_done_callback(lambda _: sends.pop(tag))
        self._slots.lend(slot, sending)
        self._slots.release(slot)  # free when the send has completed

    def _manifest(self, outgoing: Outgoing, sequence: Sequence, frame: int) -> Manifest:
        logprobs = self._scheduler.first_logprobs.get(sequence.key)
        return Manifest(
            num_frames=frame,
            kv_format_id=self._runner.kv_format.format_id,
            hash_from=sequence.chain_hash(outgoing.from_token),
            hash_end=sequence.chain_hash(sequence.num_context),
            first_tokens=((sequence.work.choice, self._scheduler.first_tokens[sequence.key]),),
            cached_tokens=sequence.cached_tokens,
            elapsed_s=max(0.0, now() - self.computed_at.get(sequence.key, now())),
            logprobs=None if logprobs is None else pack_logprobs([(0, logprobs)]),
        )


def _pack(runner: ModelRunner, view: memoryview, header: FrameHeader, block_table: BlockTable) -> int:
    """On the copy lane: gather a piece and seal its frame."""
    payload = view[HEADER_BYTES : HEADER_BYTES + header.payload_bytes]
    runner.gather(header.piece, block_table, payload)
    return seal(view, header)
