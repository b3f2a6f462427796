"""How the ranks of the torch engine exchange what each has computed: one operation, every rank's columns side by side.

Nothing is summed over ranks, so there is no order of summation to agree on: see `shard.py`.
"""

from __future__ import annotations

import ctypes
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

import torch
import torch.distributed

from kvferry.engine.native.library import Library, LibraryUnavailable, open_library
from kvferry.engine.ranks import SharedMemory

STATE_BYTES: Final = 256  # KVF_BARRIER_BYTES
BUFFER_BYTES: Final = 32 << 20  # rows that would not fit are exchanged in several rounds


class Collective(ABC):
    """One rank's side. All ranks make the same calls in the same order."""

    @abstractmethod
    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        """`part` [num_rows, widths[rank]] of each rank -> [num_rows, sum(widths)], in the order of ranks."""


class Alone(Collective):
    """Of a model that is whole."""

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        return part


class SharedGather(Collective):
    """Through memory that ranks on one host share, and a barrier of the native library.

    There are two buffers in turn: whoever writes one again has passed the barrier of the other, which all ranks reach
    only when they have read the first. So one barrier a round is enough.
    """

    def __init__(self, library: Library, memory: mmap.mmap, rank: int, size: int) -> None:
        """`memory`: `SharedGather.num_bytes` long, zero before the first rank came."""
        self._library = library
        self._memory = memory
        self._state = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._rank = rank
        self._size = size
        self._buffers = [torch.frombuffer(memory, dtype=torch.uint8, count=BUFFER_BYTES, offset=at) for at in _OFFSETS]
        self._turn = 0

    num_bytes: Final = STATE_BYTES + 2 * BUFFER_BYTES

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        whole = torch.empty(len(part), sum(widths), dtype=part.dtype)
        first = sum(widths[: self._rank])
        at_once = max(1, BUFFER_BYTES // (whole.shape[1] * part.itemsize))
        for start in range(0, len(part), at_once):
            rows = part[start : start + at_once]
            num_bytes = len(rows) * whole.shape[1] * part.itemsize
            buffer = self._buffers[self._turn][:num_bytes].view(part.dtype).view(len(rows), -1)
            self._turn = 1 - self._turn
            buffer[:, first : first + rows.shape[1]] = rows
            self._library.call(self._library.c.kvf_barrier, self._state, self._size)
            whole[start : start + len(rows)] = buffer
        return whole


_OFFSETS: Final = (STATE_BYTES, STATE_BYTES + BUFFER_BYTES)


class GlooGather(Collective):
    """Through torch.distributed's gloo, on the loopback device: where there is no native library."""

    def __init__(self, store: str, rank: int, size: int) -> None:
        """`store`: the path of an empty file that all ranks see, where they find each other."""
        distributed: Any = torch.distributed  # these have no types; a group of our own needs no global state
        options = distributed.ProcessGroupGloo._Options()
        options._devices = [distributed.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
        options._threads = 1
        self._group = distributed.ProcessGroupGloo(distributed.FileStore(store, size), rank, size, options)
        self._size = size

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        # gloo wants equal shapes, and knows bytes whatever they stand for.
        padded = part.new_zeros(len(part), max(widths))
        padded[:, : part.shape[1]] = part
        content = padded.view(torch.uint8)
        parts = [torch.empty_like(content) for _ in range(self._size)]
        self._group.allgather([parts], [content]).wait()
        return torch.cat([each.view(part.dtype)[:, :width] for each, width in zip(parts, widths, strict=True)], 1)


def open_collective(memory: SharedMemory, rank: int, size: int) -> Collective:
    """Shared memory where there is a native library, else gloo; the same for all ranks of one machine."""
    try:
        library = open_library()
    except LibraryUnavailable:
        return GlooGather(f"/proc/self/fd/{memory.descriptors[0]}", rank, size)
    return SharedGather(library, memory.exchange(SharedGather.num_bytes), rank, size)
