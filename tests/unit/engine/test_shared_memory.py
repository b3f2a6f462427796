"""Memory that ranks share: the same bytes in every mapping, at a huge page's border, for as long as anybody looks."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvferry.engine.ranks.shared_memory import HUGE_PAGE, SharedMemory, mapped_file

NUM_BYTES = 3 * HUGE_PAGE + 4096


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = SharedMemory.create(2)
    yield memory
    memory.close()


def address(mapped: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapped))


def in_huge_pages(mapped: memoryview) -> int:
    """Bytes of a mapping that the kernel has mapped so."""
    lines = Path("/proc/self/smaps").read_text()
    found = re.search(rf"^{address(mapped):x}-(?:.*\n)+?ShmemPmdMapped: +(\d+) kB$", lines, re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def test_what_one_rank_writes_the_others_read_and_no_other_cache_has(memory: SharedMemory) -> None:
    own, same, other = memory.own_cache(1, NUM_BYTES), memory.cache(1, NUM_BYTES), memory.own_cache(0, NUM_BYTES)
    assert len(own) == len(same) == NUM_BYTES
    assert not np.frombuffer(own, np.uint8).any()
    own[0], own[-1] = 1, 2
    assert (same[0], same[-1]) == (1, 2)
    assert not np.frombuffer(other, np.uint8).any()
    memory.exchange(4096)[0] = 3
    assert memory.exchange(4096)[0] == 3
    assert own[0] == 1


def test_mappings_begin_at_a_huge_pages_border_and_outlive_the_descriptors() -> None:
    memory = SharedMemory.create(1)
    mapped = [memory.cache(0, NUM_BYTES) for _ in range(3)]
    memory.close()
    assert all(address(each) % HUGE_PAGE == 0 for each in mapped)
    mapped[0][5] = 7
    assert mapped[2][5] == 7
    part = mapped.pop()[4:6]
    mapped.clear()
    assert part[1] == 7, "a view keeps all of it"


def test_a_mapping_never_cuts_what_another_one_has(memory: SharedMemory) -> None:
    long = mapped_file(memory.descriptors[0], NUM_BYTES)
    long[-1] = 1
    mapped_file(memory.descriptors[0], 4096)
    assert long[-1] == 1


def test_all_who_map_a_cache_have_it_in_huge_pages_where_the_kernel_gives_them(memory: SharedMemory) -> None:
    own = memory.own_cache(0, NUM_BYTES)
    if not in_huge_pages(own):
        pytest.skip("this kernel gives files no huge pages")
    assert in_huge_pages(own) == 3 * HUGE_PAGE
    other = memory.cache(0, NUM_BYTES)
    bytes(other)  # touches all of it
    assert in_huge_pages(other) == 3 * HUGE_PAGE
