"""The memory of a KV cache of the library, and the copies from and to it: of this rank, or of another one's.

What is handed over here has been checked (`engine/limits.py`); the library checks it once more.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvferry.engine.native.library import Cache, Library, Shape
from kvferry.engine.native.library import Piece as LibraryPiece
from kvferry.errors import SettingError
from kvferry.schedule.step import BlockTable
from kvferry.wire.frame import Piece


class NativeCache:
    """KV of one rank's heads."""

    def __init__(
        self,
        library: Library,
        shape: Shape,
        heads: range,
        num_blocks: int,
        memory: Callable[[int], mmap.mmap | memoryview],
    ) -> None:
        """`heads`: the KV heads of the whole model that lie in it. `memory` maps so many bytes; they are unmapped with
        the last reference to this object. Raises `SettingError` for more blocks than can be addressed.
        """
        self.heads = heads
        self.num_blocks = num_blocks
        self.library = library
        size = library.c.kvf_cache_bytes(ctypes.byref(shape), num_blocks)
        if not size:
            raise SettingError("num_blocks", f"{num_blocks}, more than the native engine can address")
        self._memory = np.frombuffer(memory(size), np.uint8)
        self.blocks: Final = Cache(ctypes.pointer(shape), self.address, num_blocks)

    @property
    def address(self) -> int:
        return address(self._memory)

    def copy_blocks(self, pairs: npt.NDArray[np.int32]) -> None:
        """Copy whole blocks, each (from, to), in order."""
        call = self.library.c.kvf_copy_blocks
        self.library.call(call, ctypes.byref(self.blocks), address(pairs), len(pairs) // 2)

    def part(self, piece: Piece) -> LibraryPiece | None:
        """What it has of a piece, and where that lies in the frame."""
        own = piece.heads_among(self.heads)
        if not own:
            return None
        return LibraryPiece(
            piece.layer_start, piece.layer_end, piece.token_start, piece.token_end,
            own.start - self.heads.start, own.stop - self.heads.start, piece.num_heads, own.start - piece.head_start,
        )  # fmt: skip


def gather(caches: Sequence[NativeCache], piece: Piece, block_table: BlockTable, out: memoryview) -> None:
    """Copy a piece from the caches of all ranks to a frame."""
    library = caches[0].library
    # Ranks that share a KV head have the same content.
    apart = [cache for index, cache in enumerate(caches) if index == 0 or cache.heads != caches[index - 1].heads]
    _move(library, library.c.kvf_gather, apart, piece, block_table, out)


def scatter(caches: Sequence[NativeCache], piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
    """The reverse of `gather`."""
    library = caches[0].library
    _move(library, library.c.kvf_scatter, caches, piece, block_table, payload)


def _move(
    library: Library,
    function: Callable[..., int],
    caches: Sequence[NativeCache],
    piece: Piece,
    block_table: BlockTable,
    frame: memoryview,
) -> None:
    parts = [(cache.blocks, part) for cache in caches if (part := cache.part(piece)) is not None]
    blocks = (Cache * len(parts))(*(blocks for blocks, _ in parts))
    pieces = (LibraryPiece * len(parts))(*(part for _, part in parts))
    table = np.ascontiguousarray(block_table, np.int32)
    content = np.frombuffer(frame, np.uint8)
    where = (address(table), len(table), address(content), frame.nbytes)
    library.call(function, blocks, pieces, len(parts), *where)


def address(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array's first byte. The caller keeps the array for as long as the address is used."""
    assert array.flags.c_contiguous
    where: int = array.__array_interface__["data"][0]
    return where
