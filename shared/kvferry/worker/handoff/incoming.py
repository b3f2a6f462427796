"""One pull as D sees it: which frames came, whether they tile the range, and the verdict. Pure.

`land` runs on the copy lane and is the only user of a `Tiling`; everything else runs on the event loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.errors import CorruptFrame, MalformedMessage, WireError
from kvferry.schedule.step import BlockTable, KVFormat, KVStore
from kvferry.wire.flow import Manifest, ManifestCodec
from kvferry.wire.frame import HEADER_BYTES, KIND_KV, KIND_MANIFEST, FrameHeader, check
from kvferry.wire.logprobs import TokenLogprobs, unpack_logprobs

WINDOW: Final = 4  # receives posted at once by one pull
MAX_AGAIN: Final = 3  # bad frames of one pull before it counts as failed


class Tiling:
    """Which (layer, token) cells of a range have come, of some KV heads. A cell that comes twice is an error, never a
    rewrite."""

    def __init__(self, kv: KVFormat, heads: range, token_start: int, token_end: int) -> None:
        self._kv = kv
        self._heads = heads
        self._start = token_start
        self._end = token_end
        self._come = np.zeros((kv.num_layers, token_end - token_start), dtype=np.bool_)
        self._num_missing = self._come.size

    @property
    def missing_bytes(self) -> int:
        """KV of the range that has not come."""
        return self._num_missing * self._kv.layer_token_bytes(self._heads)

    def claim(self, header: FrameHeader) -> None:
        """Raises `CorruptFrame` if the frame's piece is not a new part of the range in this KV format."""
        piece, kv = header.piece, self._kv
        inside = (
            0 <= piece.layer_start < piece.layer_end <= kv.num_layers
            and self._start <= piece.token_start < piece.token_end <= self._end
            and (piece.head_start, piece.head_end) == (self._heads.start, self._heads.stop)
        )
        if not inside or header.dtype != kv.dtype:
            raise CorruptFrame("range", str(piece))
        if header.payload_bytes != piece.num_bytes(kv.head_dim, kv.dtype):
            raise CorruptFrame("size", f"{header.payload_bytes} bytes for {piece}")
        cells = self._come[
            piece.layer_start : piece.layer_end, piece.token_start - self._start : piece.token_end - self._start
        ]
        if cells.any():
            raise CorruptFrame("twice", str(piece))
        cells[:] = True
        self._num_missing -= cells.size


@dataclass(frozen=True, slots=True)
class Landed:
    """What a good frame was."""

    header: FrameHeader
    manifest: Manifest | None
    missing_bytes: int  # KV of the range that has not come yet


def land(
    store: KVStore,
    tiling: Tiling,
    block_table: BlockTable,
    view: memoryview,
    received: int,
    pull_id: int,
    frame: int,
) -> Landed:
    """Check a frame and scatter it into the sequence's blocks. Raises `CorruptFrame`; then nothing was written."""
    header = check(view, received)
    if (header.pull_id, header.frame) != (pull_id, frame):
        raise CorruptFrame("identity", f"frame {header.frame} of pull {header.pull_id}")
    manifest = None
    payload = view[HEADER_BYTES:received]
    if header.kind == KIND_KV:
        tiling.claim(header)
        store.scatter(header.piece, block_table, payload)
    elif header.kind == KIND_MANIFEST:
        try:
            manifest = ManifestCodec().decode(payload)
        except WireError as error:
            raise CorruptFrame("manifest", str(error)) from None
    return Landed(header, manifest, tiling.missing_bytes)


@dataclass(slots=True)
class Incoming:
    """State of one pull after Fetch. Every posted receive is a credit, and P uses up every credit."""

    pull_id: int
    from_token: int
    missing_bytes: int  # KV of the range that has not come
    num_posted: int = 0
    num_bad: int = 0
    num_bytes: int = 0  # KV of good frames
    manifest: Manifest | None = None
    manifest_frame: int = 0
    over: bool = False  # verified, aborted or failed: no more credits

    def post(self) -> int:
        """The number of the next frame to post a receive for."""
        frame = self.num_posted
        self.num_posted += 1
        return frame

    def num_wanted(self, num_open: int, frame_bytes: int) -> int:
        """How many receives to post beside the `num_open` that wait: the window, and towards the end no more than
        P has frames for at the least, because it must fill the others with pads."""
        if self.over or self.manifest is not None:
            return 0
        num_frames = -(-self.missing_bytes // frame_bytes) + 1  # the manifest
        return max(0, min(WINDOW, num_frames) - num_open)

    def good(self, landed: Landed) -> None:
        """Take a good frame."""
        self.missing_bytes = min(self.missing_bytes, landed.missing_bytes)
        self.num_bytes += landed.header.payload_bytes if landed.header.kind == KIND_KV else 0
        if landed.manifest is not None:
            self.manifest = landed.manifest
            self.manifest_frame = landed.header.frame

    def bad(self) -> bool:
        """Take a bad frame. True if it should be asked for again, False if the pull has failed."""
        self.num_bad += 1
        return self.num_bad <= MAX_AGAIN

    @property
    def whole(self) -> bool:
        """All has come, the manifest included."""
        return self.missing_bytes == 0 and self.manifest is not None

    def first(self, choice: int, *, with_logprobs: bool) -> tuple[int, TokenLogprobs | None] | None:
        """Token 0 of a choice, with its log-probabilities if they are wanted; None if the manifest lacks them."""
        manifest = self.manifest
        assert manifest is not None
        row = next((row for row, (owner, _) in enumerate(manifest.first_tokens) if owner == choice), None)
        if row is None:
            return None
        token = manifest.first_tokens[row][1]
        if not with_logprobs:
            return token, None
        try:
            found = dict(unpack_logprobs(manifest.logprobs, len(manifest.first_tokens))) if manifest.logprobs else {}
        except MalformedMessage:
            return None
        return (token, found[row]) if row in found else None

    def fault(self, kv_format_id: str, hash_from: bytes, hash_end: bytes) -> str | None:
        """What is wrong with a whole pull, or None: then the sequence may run."""
        manifest = self.manifest
        assert manifest is not None
        if manifest.kv_format_id != kv_format_id:
            return "kv_format"
        if manifest.num_frames != self.manifest_frame:
            return "frame_count"
        if manifest.hash_from != hash_from or manifest.hash_end != hash_end:
            return "chain_hash"
        return None
