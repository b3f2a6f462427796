"""KV of a rank on another host: the leader asks for its part of a frame, or gives it.

    leader                                   follower, on a thread of its own
    Gather(piece, blocks)            ->        copies it from its blocks
                                     <-        the bytes, in the frame's layout
    Scatter(piece, blocks, bytes)    ->        copies them into its blocks
                                     <-        nothing, which says that it has

The piece names heads that the rank has, and no others. What it names has been checked by the leader.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.engine.ranks.caches import Cache
from kvferry.engine.ranks.channel import Channel
from kvferry.engine.ranks.followers import Followers
from kvferry.schedule.step import BlockTable, KVFormat
from kvferry.wire.frame import DTYPE_BYTES, Piece

Bounds: TypeAlias = tuple[int, int, int, int, int, int]  # of a Piece
Frame: TypeAlias = npt.NDArray[np.uint8]  # [layers, 2, tokens, kv_heads, head_dim * itemsize]


class Gather(msgspec.Struct, frozen=True, tag="gather", array_like=True):
    piece: Bounds
    blocks: bytes  # i32, little-endian


class Scatter(msgspec.Struct, frozen=True, tag="scatter", array_like=True):
    piece: Bounds
    blocks: bytes
    content: bytes


_ORDERS: Final = msgspec.msgpack.Decoder(Gather | Scatter)


class RemoteCache:
    """Implements `Cache`. Raises `RankLost`."""

    def __init__(self, followers: Followers, rank: int, kv_format: KVFormat, heads: range) -> None:
        self.heads = heads
        self._followers = followers
        self._rank = rank
        self._row = kv_format.head_dim * DTYPE_BYTES[kv_format.dtype]

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        if own := piece.heads_among(self.heads):
            answer = self._ask(Gather(_bounds(piece, own), _blocks(block_table)))
            part = part_of(out, piece, own, self._row)
            part[...] = np.frombuffer(answer, np.uint8).reshape(part.shape)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        if own := piece.heads_among(self.heads):
            content = part_of(payload, piece, own, self._row).tobytes()
            self._ask(Scatter(_bounds(piece, own), _blocks(block_table), content))

    def close(self) -> None:
        """The rank ends with its channels."""

    def _ask(self, order: Gather | Scatter) -> bytes:
        return self._followers.ask(self._rank, msgspec.msgpack.encode(order))


def part_of(frame: memoryview, piece: Piece, heads: range, row_bytes: int) -> Frame:
    """Some heads of a piece's frame, a view. `row_bytes`: of one head of one token."""
    shape = (piece.num_layers, 2, piece.num_tokens, piece.num_heads, row_bytes)
    lanes = np.frombuffer(frame, np.uint8).reshape(shape)
    return lanes[:, :, :, heads.start - piece.head_start : heads.stop - piece.head_start]


def serve_copies(channel: Channel, cache: Cache, kv_format: KVFormat) -> None:
    """Answer the leader, until it ends the channel. Raises whatever goes wrong."""
    while (payload := channel.receive()) is not None:
        order = _ORDERS.decode(payload)
        piece, table = Piece(*order.piece), np.frombuffer(order.blocks, "<i4")
        match order:
            case Gather():
                out = bytearray(piece.num_bytes(kv_format.head_dim, kv_format.dtype))
                cache.gather(piece, table, memoryview(out))
                channel.send(bytes(out))
            case Scatter(content=content):
                cache.scatter(piece, table, memoryview(content))
                channel.send(b"")


def _bounds(piece: Piece, own: range) -> Bounds:
    return (piece.layer_start, piece.layer_end, piece.token_start, piece.token_end, own.start, own.stop)


def _blocks(block_table: BlockTable) -> bytes:
    return np.ascontiguousarray(block_table, "<i4").tobytes()
