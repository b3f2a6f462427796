"""When to reserve memory for a pull: late enough not to hold it idle, early enough to hide the transfer. Pure."""

from __future__ import annotations

import math
from typing import Final

from kvferry.wire.flow import Progress

FIRST_GUESS_BYTES_PER_S: Final = 500e6  # before a pull has been measured; loopback UCX is several times faster
MEMORY_BYTES: Final = 256 << 20  # a measured byte counts 1/e as much once so many others have come after it
MIN_BYTES: Final = 1 << 20  # smaller pulls measure round trips, not throughput
TRANSFER_BOUND: Final = 2.0  # a pull that took so many times its prefill waited for the transfer


class TransferRate:
    """The rate of whole pulls, learned as they end: bytes over seconds, both forgotten as bytes go by.

    So large pulls count for more than small ones, and a network that changes is followed within a few
    `MEMORY_BYTES` in either direction.
    """

    def __init__(self) -> None:
        self._bytes = float(MEMORY_BYTES)
        self._seconds = MEMORY_BYTES / FIRST_GUESS_BYTES_PER_S

    @property
    def bytes_per_s(self) -> float:
        return self._bytes / self._seconds

    def observe(self, num_bytes: int, seconds: float, prefill_s: float = 0.0) -> bool:
        """A pull of `seconds` has ended; P went on computing for the first `prefill_s` of them.

        One that streams beside its prefill takes as long as the prefill, however fast the transfer is: it tells the
        rate only where it was faster than thought, or took much longer than the prefill. False: it told nothing.
        """
        if num_bytes < MIN_BYTES or seconds <= 0:
            return False
        if num_bytes < self.bytes_per_s * seconds and seconds < TRANSFER_BOUND * prefill_s:
            return False
        keep = math.exp(-num_bytes / MEMORY_BYTES)
        self._bytes = self._bytes * keep + num_bytes
        self._seconds = self._seconds * keep + seconds
        return True

    def seconds(self, num_bytes: int) -> float:
        return num_bytes / self.bytes_per_s


def is_due(progress: Progress, transfer_s: float, lead_s: float) -> bool:
    """P holds memory, and by the time its prefill ends the transfer of all before could just have ended."""
    return progress.holds_memory and progress.expected_s <= transfer_s + lead_s
