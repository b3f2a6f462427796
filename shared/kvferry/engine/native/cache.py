"""The memory of a KV cache of the library, and the copies from and to it: of this rank, or of another one's.

What is handed over here has been checked (`engine/limits.py`); the library checks it once more.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

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
        self, library: Library, shape: Shape, heads: range, num_blocks: int, memory: Callable[[int], mmap.mmap]
    ) -> None:
        """`heads`: the KV heads of the whole model that lie in it. `memory` maps so many bytes; they are unmapped with
        the last reference to this object. Raises `SettingError` for more blocks than can be addressed.
        """
        self.heads = heads
        self.num_blocks = num_blocks
        self._library = library
        size = library.c.kvf_cache_bytes(ctypes.byref(shape), num_blocks)
        if not size:
            raise SettingError("num_blocks", f"{num_blocks}, more than the native engine can address")
        self._memory = np.frombuffer(memory(size), np.uint8)
        self._cache = Cache(ctypes.pointer(shape), self.address, num_blocks)

    @property
    def address(self) -> int:
        return address(self._memory)

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        """Copy what it has of a piece to its place in the frame."""
        self._move(self._library.c.kvf_gather, piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        """The reverse of `gather`."""
        self._move(self._library.c.kvf_scatter, piece, block_table, payload)

    def copy_blocks(self, pairs: npt.NDArray[np.int32]) -> None:
        """Copy whole blocks, each (from, to), in order."""
        call = self._library.c.kvf_copy_blocks
        self._library.call(call, ctypes.byref(self._cache), address(pairs), len(pairs) // 2)

    def _move(self, function: Callable[..., int], piece: Piece, block_table: BlockTable, frame: memoryview) -> None:
        first, last = max(piece.head_start, self.heads.start), min(piece.head_end, self.heads.stop)
        if first >= last:
            return
        bounds = LibraryPiece(
            piece.layer_start, piece.layer_end, piece.token_start, piece.token_end,
            first - self.heads.start, last - self.heads.start, piece.num_heads, first - piece.head_start,
        )  # fmt: skip
        table = np.ascontiguousarray(block_table, np.int32)
        content = np.frombuffer(frame, np.uint8)
        cache, where = ctypes.byref(self._cache), ctypes.byref(bounds)
        self._library.call(function, cache, where, address(table), len(table), address(content), frame.nbytes)


def address(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array's first byte. The caller keeps the array for as long as the address is used."""
    assert array.flags.c_contiguous
    where: int = array.__array_interface__["data"][0]
    return where
