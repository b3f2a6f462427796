"""How the ranks of the torch engine exchange what each has computed: one operation, every rank's columns side by side.

Nothing is summed over ranks, so there is no order of summation to agree on: see `ranks/shard.py`.
"""

from __future__ import annotations

import ctypes
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeAlias

import torch
import torch.distributed

from kvferry.engine.native.library import BARRIER_BYTES, Library, LibraryUnavailable, open_library
from kvferry.engine.ranks.followers import Exchange
from kvferry.engine.ranks.shared_memory import SharedMemory

distributed: Any = torch.distributed  # its stores and groups have no types
Store: TypeAlias = Any
CPU: Final = torch.device("cpu")
# For all ranks to come to a step over the network. A worker whose step takes too long ends earlier, by `step_timeout`;
# a rank whose leader is cut off ends by this.
EXCHANGE_TIMEOUT: Final = timedelta(minutes=5)
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

    def __init__(self, library: Library, memory: memoryview, rank: int, size: int) -> None:
        """`memory`: `SharedGather.num_bytes` long, zero before the first rank came."""
        self._library = library
        self._memory = memory
        self._state = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._rank = rank
        self._size = size
        self._buffers = [torch.frombuffer(memory, dtype=torch.uint8, count=BUFFER_BYTES, offset=at) for at in _OFFSETS]
        self._turn = 0

    num_bytes: Final = BARRIER_BYTES + 2 * BUFFER_BYTES

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


_OFFSETS: Final = (BARRIER_BYTES, BARRIER_BYTES + BUFFER_BYTES)


class NetworkGather(Collective):
    """Through torch.distributed, where ranks share no memory or have no native library: gloo on CPUs, NCCL on CUDA.

    The ranks find each other with the first exchange. Until then one that can't load is no reason for others to wait.
    """

    def __init__(self, store: Callable[[], Store], host: str, rank: int, size: int, device: torch.device = CPU) -> None:
        """`store` opens the one where all ranks find each other; `host`: this rank's address, as the others see it;
        `device`: what its tensors are on."""
        self._store = store
        self._host = host
        self._rank = rank
        self._size = size
        self._device = device
        self._group: Any = None

    def gather(self, part: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
        if self._group is None:
            self._group = self._met()
        # Both want equal shapes, and know bytes whatever they stand for.
        padded = part.new_zeros(len(part), max(widths))
        padded[:, : part.shape[1]] = part
        content = padded.view(torch.uint8)
        parts = [torch.empty_like(content) for _ in range(self._size)]
        self._group.allgather([parts], [content]).wait()
        return torch.cat([each.view(part.dtype)[:, :width] for each, width in zip(parts, widths, strict=True)], 1)

    def _met(self) -> Any:
        """The group, once all ranks are there. One of our own needs no global state."""
        return self._nccl() if self._device.type == "cuda" else self._gloo()

    def _gloo(self) -> Any:
        gloo = distributed.ProcessGroupGloo
        options = gloo._Options()
        options._devices = [gloo.create_device(hostname=self._host)]
        options._threads = 1
        options._timeout = EXCHANGE_TIMEOUT
        return gloo(self._store(), self._rank, self._size, options)

    def _nccl(self) -> Any:
        """Written to NCCL's interface, and never run: no machine with two GPUs was there."""
        nccl = distributed.ProcessGroupNCCL
        options = nccl.Options()
        options._timeout = EXCHANGE_TIMEOUT
        torch.cuda.set_device(self._device)
        return nccl(self._store(), self._rank, self._size, options)


def open_collective(memory: SharedMemory, rank: int, size: int) -> Collective:
    """Of ranks on one host: shared memory where there is a native library, else gloo; the same for all."""
    try:
        library = open_library()
    except LibraryUnavailable:
        path = f"/proc/self/fd/{memory.descriptors[0]}"  # of an empty file that all ranks see
        return NetworkGather(lambda: distributed.FileStore(path, size), "127.0.0.1", rank, size)
    return SharedGather(library, memory.exchange(SharedGather.num_bytes), rank, size)


def open_exchange(host: str) -> tuple[Exchange, Store]:
    """What the leader of ranks on several hosts opens, on its address: they find each other there."""
    server = socket.create_server((host, 0))
    port = server.getsockname()[1]
    store = distributed.TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=server.detach(), timeout=EXCHANGE_TIMEOUT
    )
    return Exchange(host, port), store


def joined_exchange(exchange: Exchange, host: str, rank: int, size: int, device: torch.device = CPU) -> Collective:
    """The side of any other rank. `host`: its own address."""

    def store() -> Store:
        return distributed.TCPStore(exchange.host, exchange.port, is_master=False, timeout=EXCHANGE_TIMEOUT)

    return NetworkGather(store, host, rank, size, device)
