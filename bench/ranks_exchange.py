"""What ranks pay to exchange rows: the barrier alone, and write, barrier and read, beside copying the same bytes alone.

The ranks are threads of this process, over the memory that processes would share: a cache line goes the same way.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_double, c_int32, c_void_p
from dataclasses import dataclass
from typing import Final

import numpy as np

from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import BARRIER_BYTES, Library
from kvferry.engine.ranks.shard import cut
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.runtime import mapped_memory

BF16_BYTES: Final = 2
TRIES: Final = 5  # the best counts: others may use the cores
ROUND_BYTES: Final = 1 << 26  # of one try; at most MAX_ROUNDS
MAX_ROUNDS: Final = 2000


@dataclass(frozen=True, slots=True)
class Columns:
    """One of a layer's exchanges. `exact`: only since each output is summed by one rank, in one order; ranks that sum
    over their own inputs keep these columns to themselves."""

    name: str
    width: int
    exact: bool = False


def exchanges(config: ModelConfig) -> tuple[Columns, ...]:
    """Of a layer, in their order."""
    return (
        Columns("what attention returns", config.num_heads * config.head_dim, exact=True),
        Columns("hidden states behind attention", config.hidden_size),
        Columns("what the MLP multiplies", config.intermediate_size, exact=True),
        Columns("hidden states behind the MLP", config.hidden_size),
    )


@dataclass(frozen=True, slots=True)
class Taken:
    """Seconds of one exchange."""

    together: float
    alone: float  # the two copies that one rank makes, by one thread that waits for nobody


class Ranks:
    """So many threads that exchange rows. To be closed."""

    def __init__(self, library: Library, size: int) -> None:
        self._seconds: Callable[..., float] = library.c.kvf_exchange_seconds
        self._seconds.argtypes = [c_void_p, c_int32, c_void_p, c_void_p, *[c_int32] * 5]
        self._seconds.restype = c_double
        self._size = size
        self._pool = ThreadPoolExecutor(size)

    def close(self) -> None:
        self._pool.shutdown()

    def barrier(self) -> float:
        """Seconds."""
        return min(self._together(0, 0)[0] for _ in range(TRIES))

    def exchange(self, rows: int, width: int) -> Taken:
        """Of rows of `width` bf16 values."""
        row = width * BF16_BYTES
        together = min(self._together(rows, row)[0] for _ in range(TRIES))
        return Taken(together, min(self._alone(rows, row) for _ in range(TRIES)))

    def content(self, rows: int, width: int) -> list[np.ndarray]:
        """What each rank has read behind an exchange; each wrote its own number plus 1."""
        return self._together(rows, width * BF16_BYTES)[1]

    def _together(self, rows: int, row: int) -> tuple[float, list[np.ndarray]]:
        """Seconds of the slowest rank, and what each has read."""
        memory = SharedMemory.create(1)
        try:
            shared = memory.exchange(BARRIER_BYTES + 2 * rows * row)
            wholes = [np.zeros((rows, row), np.uint8) for _ in range(self._size)]
            told = [(shared, self._size, rank, whole) for rank, whole in enumerate(wholes)]
            return max(self._pool.map(lambda each: self._one(*each), told)), wholes
        finally:
            memory.close()

    def _alone(self, rows: int, row: int) -> float:
        private = mapped_memory(BARRIER_BYTES + 2 * rows * row)
        return self._one(memoryview(private), 1, 0, np.zeros((rows, row), np.uint8))

    def _one(self, memory: memoryview, ranks: int, rank: int, whole: np.ndarray) -> float:
        rows, row = whole.shape
        columns = cut(row // BF16_BYTES, self._size, rank)  # also alone: the same bytes
        begin, end = columns.start * BF16_BYTES, columns.stop * BF16_BYTES
        own = np.full((rows, end - begin), rank + 1, np.uint8)
        rounds = min(MAX_ROUNDS, ROUND_BYTES // max(whole.size, 1))
        state = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        return self._seconds(state, ranks, own.ctypes.data, whole.ctypes.data, rows, row, begin, end, rounds)
