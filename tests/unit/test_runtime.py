"""Memory that is mapped for KV and for frames."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest

from kvferry.runtime import mapped_memory

NUM_BYTES = 128 << 20  # 64 huge pages, or 32,768 small ones


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux fills memory when it is mapped, and counts faults so")
def test_mapped_memory_is_there_before_it_is_written() -> None:
    memory = mapped_memory(NUM_BYTES)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for start in range(0, NUM_BYTES, mmap.PAGESIZE):
        memory[start] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16
    memory.close()
