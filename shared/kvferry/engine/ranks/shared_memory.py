"""Memory that the ranks of one worker share, on one host: what they exchange in a step, and the KV of each rank.

Anonymous memory files, which live as long as a process holds their descriptors or has mapped them. Linux.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from typing import Any, Final

from kvferry.runtime import MADV_POPULATE_WRITE

HUGE_PAGE: Final = 2 << 20
_MAP_FIXED: Final = 0x10  # neither is in the module `mmap`
_MADV_COLLAPSE: Final = 25


class SharedMemory:
    """The files of all ranks."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        """Of what is exchanged, then of the caches by rank. They are this object's to close."""
        self.descriptors: Final = tuple(descriptors)

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        """For `size` ranks."""
        return cls([os.memfd_create(name) for name in ("kvferry-exchange", *("kvferry-kv" for _ in range(size)))])

    def exchange(self, num_bytes: int) -> memoryview:
        return mapped_file(self.descriptors[0], num_bytes)

    def cache(self, rank: int, num_bytes: int) -> memoryview:
        """Of another rank; `own_cache` is this one's."""
        return mapped_file(self.descriptors[1 + rank], num_bytes)

    def own_cache(self, rank: int, num_bytes: int) -> memoryview:
        """With its RAM, in huge pages if it can be; all ranks that map it have them then."""
        memory = self.cache(rank, num_bytes)
        collapse(memory)
        return memory

    def close(self) -> None:
        """Close the descriptors. What is mapped stays."""
        for descriptor in self.descriptors:
            os.close(descriptor)


def mapped_file(descriptor: int, num_bytes: int) -> memoryview:
    """A memory file, made so long and mapped: what one process writes the others see. Zero at first. Unmapped with the
    last view of it.

    It begins at a huge page's border, as it must to be mapped by huge pages. The module `mmap` can't say where; so it
    takes a range that is longer, and the file is mapped over a part of that.
    """
    os.ftruncate(descriptor, max(num_bytes, os.fstat(descriptor).st_size))
    span = mmap.mmap(-1, num_bytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    first = -_address(span) % HUGE_PAGE
    place, flags = _address(span) + first, mmap.MAP_SHARED | _MAP_FIXED
    if _libc().mmap(place, num_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, descriptor, 0) != place:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return memoryview(span)[first : first + num_bytes]


def collapse(memory: memoryview) -> None:
    """Give it its RAM, in huge pages.

    The copies of KV miss the TLB at every small page, which takes a quarter of their time or more. Kernels keep the
    pages of files small unless an administrator has said otherwise (`shmem_enabled`); since Linux 6.1 a process may ask
    for each range. Where it may not the memory stays as it is.
    """
    whole = len(memory) // HUGE_PAGE * HUGE_PAGE
    for advice in (MADV_POPULATE_WRITE, _MADV_COLLAPSE):
        _libc().madvise(_address(memory), whole, advice)


def _address(memory: mmap.mmap | memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
    )  # fmt: skip
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return libc
