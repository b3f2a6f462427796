"""The library's model: one rank's weights, or all of them, and one engine step.

What is handed over here has been checked (`engine/limits.py`); the library checks it once more.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.engine.bf16 import Bits, Floats, from_bf16, to_bf16
from kvferry.engine.columns import Columns
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.cache import NativeCache, address
from kvferry.engine.native.library import SEQUENCE, Library, Shape, Weight
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.rope import rope_tables


class NativeModel:
    """The library's model. Everything that it is given has been checked."""

    def __init__(self, library: Library, shape: Shape, config: ModelConfig) -> None:
        self._library = library
        self._c = library.c
        self._shape = shape
        self._kept: list[object] = []  # memory that the library uses
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

    def finish(self, cache: NativeCache) -> None:
        """All weights are loaded: steps will use this cache."""
        self._library.call(self._c.kvf_model_finish, self._handle)
        self._library.call(self._c.kvf_model_set_cache, self._handle, cache.address, cache.num_blocks)
        self._kept.append(cache)

    def join(self, memory: SharedMemory) -> None:
        """Take steps together with the other ranks from now on."""
        exchanged = np.frombuffer(memory.exchange(self._c.kvf_shared_bytes(ctypes.byref(self._shape))), np.uint8)
        self._library.call(self._c.kvf_model_join, self._handle, address(exchanged))
        self._kept.append(exchanged)

    @property
    def handle(self) -> int | None:
        """The `kvf_model`; None when it is closed."""
        return self._handle

    @property
    def weight_bytes(self) -> int:
        size: int = self._c.kvf_model_weight_bytes(self._handle)
        return size

    def step(self, columns: Columns, logits: Floats | None) -> None:
        """One engine step; `logits` [wanted rows, vocab] is filled. Without it they are left to `logits`. Ranks but the
        first get none: there any array says that they are to be computed."""
        sequences = np.empty(len(columns.num_rows), SEQUENCE)
        sequences["num_rows"] = columns.num_rows
        sequences["num_blocks"] = columns.num_blocks
        sequences["start"] = columns.start
        sequences["logits"] = columns.wanted
        sequences["tokens"] = _addresses(columns.tokens, columns.num_rows)
        sequences["block_table"] = _addresses(columns.tables, columns.num_blocks)
        out = None if logits is None else address(logits)
        self._library.call(self._c.kvf_step, self._handle, address(sequences), len(sequences), out)

    def logits(self, rows: range, logits: Floats) -> None:
        """Fill `logits` [rows, vocab] with those of some of the last step's wanted rows."""
        self._library.call(self._c.kvf_logits, self._handle, rows.start, len(rows), address(logits))

    def close(self) -> None:
        """Free weights, workspace and threads; the cache unless others hold it. May be called twice."""
        self._c.kvf_model_free(self._handle)
        self._handle = None
        self._kept.clear()


def _addresses(joined: npt.NDArray[Any], counts: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """Addresses of the parts of an array that was joined from parts of these lengths."""
    starts = np.cumsum(counts, dtype=np.uint64) - counts.astype(np.uint64)
    return np.uint64(address(joined)) + starts * np.uint64(joined.itemsize)
