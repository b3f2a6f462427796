"""When to reserve memory for a pull: late enough not to hold it idle, early enough to hide the transfer. Pure."""

from __future__ import annotations

from typing import Final

from kvferry.wire.flow import Progress

FIRST_GUESS_BYTES_PER_S: Final = 500e6  # before a pull has been measured; loopback UCX is several times faster
SMOOTHING: Final = 0.3
MIN_BYTES: Final = 1 << 20  # smaller pulls measure round trips, not throughput


class TransferRate:
    """The rate of whole pulls, learned as they end."""

    def __init__(self) -> None:
        self.bytes_per_s = FIRST_GUESS_BYTES_PER_S

    def observe(self, num_bytes: int, seconds: float) -> None:
        # A pull that streams beside its prefill takes as long as the prefill: only faster ones tell the rate.
        if num_bytes >= MIN_BYTES and seconds > 0 and num_bytes / seconds > self.bytes_per_s:
            self.bytes_per_s += (num_bytes / seconds - self.bytes_per_s) * SMOOTHING

    def seconds(self, num_bytes: int) -> float:
        return num_bytes / self.bytes_per_s


def is_due(progress: Progress, transfer_s: float, lead_s: float) -> bool:
    """P holds memory, and by the time its prefill ends the transfer of all before could just have ended."""
    return progress.holds_memory and progress.expected_s <= transfer_s + lead_s
