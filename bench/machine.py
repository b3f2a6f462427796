"""The machine's own limits for one thread, and what a model asks of it."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Final

import numpy as np

from kvferry.engine.checkpoint import expected_shapes
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library
from kvferry.runtime import mapped_memory

DOT_SECONDS: Final = 0.3
READ_BYTES: Final = 1 << 29  # far larger than any cache
TRIES: Final = 5  # the best counts: others may use the cores
BF16_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Machine:
    flops: float  # FLOP/s of bf16 multiply-adds that stay in registers
    read: float  # bytes/s

    @classmethod
    def measured(cls, library: Library) -> Machine:
        """Takes about two seconds."""
        dot = library.c.kvf_peak_dot
        dot.argtypes, dot.restype = [ctypes.c_double], ctypes.c_double
        return cls(max(dot(DOT_SECONDS) for _ in range(TRIES)), read_bandwidth(library, 1))


def read_bandwidth(library: Library, threads: int) -> float:
    """Bytes/s of so many threads that read at the same time."""
    read = library.c.kvf_peak_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_uint64], ctypes.c_double
    memory = [np.frombuffer(mapped_memory(READ_BYTES), np.uint8) for _ in range(threads)]
    for one in memory:
        one[:] = 1  # pages that nobody wrote may all be one page of zeros
    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(lambda one: float(read(one.ctypes.data, READ_BYTES)), memory)) for _ in range(TRIES))


def parameters(config: ModelConfig) -> int:
    """All but the embedding and the head."""
    shapes = expected_shapes(config)
    return sum(prod(shape) for name, shape in shapes.items() if name.startswith("model.layers."))


def prefill_flops(config: ModelConfig, length: int) -> float:
    """2 per parameter and token, causal attention, and the head for the last token."""
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * (length * (length + 1) / 2)
    return 2 * parameters(config) * length + attention + 2 * config.vocab_size * config.hidden_size


def decode_bytes(config: ModelConfig) -> float:
    """Weights that one step reads, in bf16: the layers and the head."""
    return BF16_BYTES * (parameters(config) + config.vocab_size * config.hidden_size)
