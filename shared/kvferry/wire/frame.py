"""The KV frame: what travels in one staging slot.

Layout, little-endian, 64 bytes of header and then the payload:

    offset  type  field
     0      u16   magic 0x4B56
     2      u8    wire version
     3      u8    kind: 1 KV, 2 manifest, 3 pad
     4      u32   pull_id
     8      u32   frame number within the pull
    12      u16   first layer        14  u16  layer after the last
    16      u32   first token        20  u32  token after the last
    24      u16   first KV head      26  u16  head after the last
    28      u8    dtype: 1 bf16, 2 fp16, 3 fp32
    29      u8    0
    30      u16   0
    32      u32   payload bytes
    36      u32   0
    40      u64   XXH3-64 of the payload, seeded with XXH3-64 of the header up to here
    48      16×0  reserved

KV payload: [layers, 2 (K then V), tokens, kv_heads, head_dim], C order, in the frame's dtype. It does not
depend on how either side stores its cache.
Manifest payload: one `Manifest` message.
A pad has no payload: P uses up the credits that a finished or aborted pull leaves, so that every receive that
D posted completes and its slot comes back.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

import xxhash

from kvferry.errors import CorruptFrame
from kvferry.wire.codec import WIRE_VERSION

HEADER_BYTES: Final = 64
MAGIC: Final = 0x4B56
KIND_KV: Final = 1
KIND_MANIFEST: Final = 2
KIND_PAD: Final = 3
_KINDS: Final = (KIND_KV, KIND_MANIFEST, KIND_PAD)
DTYPE_CODES: Final = {"bfloat16": 1, "float16": 2, "float32": 3}
DTYPE_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}
_DTYPE_NAMES: Final = {code: name for name, code in DTYPE_CODES.items()}
_HEAD: Final = struct.Struct("<HBBIIHHIIHHBBHII")
_SUM: Final = struct.Struct("<Q")
_SUM_OFFSET: Final = 40


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of one sequence's KV: half-open ranges of layers, tokens and KV heads."""

    layer_start: int
    layer_end: int
    token_start: int
    token_end: int
    head_start: int
    head_end: int

    @property
    def num_layers(self) -> int:
        return self.layer_end - self.layer_start

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token_start

    @property
    def num_heads(self) -> int:
        return self.head_end - self.head_start

    def heads_among(self, heads: range) -> range:
        """Those of its heads that are in a contiguous range; an empty range if none is."""
        return range(max(self.head_start, heads.start), min(self.head_end, heads.stop))

    def num_bytes(self, head_dim: int, dtype: str) -> int:
        return self.num_layers * 2 * self.num_tokens * self.num_heads * head_dim * DTYPE_BYTES[dtype]


NO_PIECE: Final = Piece(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class FrameHeader:
    kind: int
    pull_id: int
    frame: int
    piece: Piece
    dtype: str
    payload_bytes: int


def frame_tag(pull_id: int, frame: int) -> int:
    """Transport tag of a frame: never used twice on a connection."""
    return pull_id << 32 | frame


def seal(slot: memoryview, header: FrameHeader) -> int:
    """Write the header of a payload that already stands at `slot[HEADER_BYTES:]`.

    Returns the number of bytes to send. Costs one pass over the payload.
    """
    piece = header.piece
    _HEAD.pack_into(
        slot, 0, MAGIC, WIRE_VERSION, header.kind, header.pull_id, header.frame,
        piece.layer_start, piece.layer_end, piece.token_start, piece.token_end,
        piece.head_start, piece.head_end, DTYPE_CODES[header.dtype], 0, 0, header.payload_bytes, 0,
    )  # fmt: skip
    end = HEADER_BYTES + header.payload_bytes
    _SUM.pack_into(slot, _SUM_OFFSET, _checksum(slot, end))
    slot[48:HEADER_BYTES] = bytes(16)
    return end


def check(slot: memoryview, received: int) -> FrameHeader:
    """The header of a frame of `received` bytes, after every check that needs no context.

    Raises `CorruptFrame` with reason `short`, `long`, `header` or `checksum`.
    """
    if received < HEADER_BYTES:
        raise CorruptFrame("short", f"{received} bytes")
    (magic, version, kind, pull_id, frame, layer_start, layer_end, token_start, token_end,
     head_start, head_end, dtype, zero1, zero2, payload_bytes, zero3) = _HEAD.unpack_from(slot, 0)  # fmt: skip
    if magic != MAGIC or version != WIRE_VERSION or kind not in _KINDS:
        raise CorruptFrame("header", f"magic {magic:#x} version {version} kind {kind}")
    if dtype not in _DTYPE_NAMES or zero1 or zero2 or zero3 or any(slot[48:HEADER_BYTES]):
        raise CorruptFrame("header", "reserved or dtype")
    if received != HEADER_BYTES + payload_bytes:
        reason = "short" if received < HEADER_BYTES + payload_bytes else "long"
        raise CorruptFrame(reason, f"{received} bytes, header says {HEADER_BYTES + payload_bytes}")
    if _SUM.unpack_from(slot, _SUM_OFFSET)[0] != _checksum(slot, received):
        raise CorruptFrame("checksum", f"frame {frame}")
    piece = Piece(layer_start, layer_end, token_start, token_end, head_start, head_end)
    return FrameHeader(kind, pull_id, frame, piece, _DTYPE_NAMES[dtype], payload_bytes)


def _checksum(slot: memoryview, end: int) -> int:
    seed = xxhash.xxh3_64_intdigest(slot[:_SUM_OFFSET])
    # Not in one shot: `update` releases the GIL for a large buffer, the one-shot functions keep it.
    digest = xxhash.xxh3_64(seed=seed)
    digest.update(slot[HEADER_BYTES:end])
    return digest.intdigest()
