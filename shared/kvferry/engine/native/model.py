"""The library's model with its KV cache: one engine step, copies of KV, and their memory.

What is handed over here has been checked (`engine/limits.py`); the library checks it once more.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.engine.bf16 import Bits, Floats, from_bf16, to_bf16
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import SEQUENCE, Library, Shape, Wanted, Weight
from kvferry.engine.native.library import Piece as LibraryPiece
from kvferry.engine.rope import rope_tables
from kvferry.errors import SettingError
from kvferry.runtime import mapped_memory
from kvferry.schedule.step import BlockTable, SequenceStep
from kvferry.wire.frame import Piece


class NativeModel:
    """The library's model and its cache memory. Everything that it is given has been checked."""

    def __init__(self, library: Library, shape: Shape, config: ModelConfig) -> None:
        self._library = library
        self._c = library.c
        self._shape = shape
        self._cache: npt.NDArray[np.uint8] = np.empty(0, np.uint8)
        windows = np.asarray([window or 0 for window in config.windows], np.int32)
        cos, sin = (from_bf16(to_bf16(table)) for table in rope_tables(config.rope, config.head_dim, shape.max_len))
        error = ctypes.c_int32()
        self._handle: int | None = self._c.kvf_model_create(
            ctypes.byref(shape), address(windows), address(cos), address(sin), ctypes.byref(error)
        )
        if self._handle is None:
            raise library.failure(error.value)

    def load(self, weight: Weight, layer: int, rows: Bits, first_row: int) -> None:
        self._library.call(self._c.kvf_model_load, self._handle, weight, layer, address(rows), *rows.shape, first_row)

    def finish(self, num_blocks: int) -> None:
        """All weights are loaded: make the KV cache."""
        self._library.call(self._c.kvf_model_finish, self._handle)
        size = self._c.kvf_cache_bytes(ctypes.byref(self._shape), num_blocks)
        if not size:
            raise SettingError("num_blocks", f"{num_blocks}, more than the native engine can address")
        self._cache = np.frombuffer(mapped_memory(size), np.uint8)
        self._library.call(self._c.kvf_model_set_cache, self._handle, address(self._cache), num_blocks)

    @property
    def handle(self) -> int | None:
        """The `kvf_model`; None when it is closed."""
        return self._handle

    @property
    def weight_bytes(self) -> int:
        size: int = self._c.kvf_model_weight_bytes(self._handle)
        return size

    def step(self, steps: Sequence[SequenceStep], wanted: Sequence[Wanted], logits: Floats) -> None:
        """One engine step; `logits` [wanted rows, vocab] is filled."""
        if not steps:
            return
        tokens = np.concatenate([step.tokens for step in steps])
        tables = np.concatenate([step.block_table for step in steps])
        if tokens.dtype != np.uint32 or tables.dtype != np.int32:
            raise RuntimeError(f"tokens are {tokens.dtype} and blocks {tables.dtype}, must be uint32 and int32")
        sequences = np.empty(len(steps), SEQUENCE)
        sequences["num_rows"] = [len(step.tokens) for step in steps]
        sequences["num_blocks"] = [len(step.block_table) for step in steps]
        sequences["start"] = [step.start for step in steps]
        sequences["logits"] = wanted
        sequences["tokens"] = _addresses(tokens, sequences["num_rows"])
        sequences["block_table"] = _addresses(tables, sequences["num_blocks"])
        self._library.call(self._c.kvf_step, self._handle, address(sequences), len(steps), address(logits))

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._move(self._c.kvf_gather, piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._move(self._c.kvf_scatter, piece, block_table, payload)

    def copy_blocks(self, pairs: npt.NDArray[np.int32]) -> None:
        self._library.call(self._c.kvf_copy_blocks, self._handle, address(pairs), len(pairs) // 2)

    def close(self) -> None:
        """Free weights, workspace, threads and cache. May be called twice."""
        self._c.kvf_model_free(self._handle)
        self._handle = None
        self._cache = np.empty(0, np.uint8)

    def _move(self, function: Callable[..., int], piece: Piece, block_table: BlockTable, frame: memoryview) -> None:
        bounds = LibraryPiece(
            piece.layer_start, piece.layer_end, piece.token_start, piece.token_end, piece.head_start, piece.head_end
        )
        table = np.ascontiguousarray(block_table, np.int32)
        content = np.frombuffer(frame, np.uint8)
        self._library.call(
            function, self._handle, ctypes.byref(bounds), address(table), len(table), address(content), frame.nbytes
        )


def address(array: npt.NDArray[Any]) -> int:
    """Of a contiguous array's first byte. The caller keeps the array for as long as the address is used."""
    assert array.flags.c_contiguous
    where: int = array.__array_interface__["data"][0]
    return where


def _addresses(joined: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """Addresses of the parts of an array that was joined from parts of these lengths."""
    starts = np.cumsum(counts, dtype=np.uint64) - counts.astype(np.uint64)
    return np.uint64(address(joined)) + starts * np.uint64(joined.itemsize)
