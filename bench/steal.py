"""What the hypervisor has taken meanwhile: time in which a core of this machine had work and did not run. A pause of a
few tens of milliseconds decides a worst gap or a p99 by itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from kvferry.runtime import blocking_clock

STAT: Final = Path("/proc/stat")
SHORTEST_S: Final = 1.0  # a tick is 10 ms
STOLEN: Final = 8  # its place in the line of all cores, in clock ticks (proc(5))


def stolen_s(stat: Path = STAT) -> float | None:
    """Of all cores, since the machine started. None where the kernel does not tell."""
    try:
        columns = stat.read_text(encoding="ascii").split("\n", 1)[0].split()
        return int(columns[STOLEN]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return None


class Steal:
    """From its making on."""

    def __init__(self, stat: Path = STAT) -> None:
        self._stat = stat
        self._before = stolen_s(stat)
        self._began = blocking_clock()

    def share(self) -> float | None:
        """Of the time of all cores, until now. None where that is too short to tell, too."""
        after, seconds = stolen_s(self._stat), blocking_clock() - self._began
        if self._before is None or after is None or seconds < SHORTEST_S:
            return None
        return (after - self._before) / (seconds * (os.cpu_count() or 1))  # the count is of all, whatever we may use

    def __str__(self) -> str:
        share = self.share()
        return "not told" if share is None else f"{share:.2%} of the cores' time"
