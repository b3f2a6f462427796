"""What a machine that is busy with other things adds to a bound: the time that processes stood ready and did not run.

The kernel counts it for each thread (`/proc/<pid>/task/<tid>/schedstat`, second field). A bound of the design is one on
what the stack does, so who checks it grants on top of it the longest wait of any one of its processes meanwhile; a
stack that is slow by itself gets nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from kvferry.runtime import blocking_clock

SAMPLE_S: Final = 0.25


def seconds_waited(pid: int) -> float:
    """Of all threads of a process, since they began; 0 where the kernel does not count it."""
    total = 0
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[1])
    except (OSError, IndexError):
        return 0.0
    return total / 1e9


class Contention:
    """Samples of some processes, from now on."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids: tuple[int, ...] = tuple(pids)
        self._samples: list[tuple[float, dict[int, float]]] = []
        self._take()

    def follow(self, pids: Iterable[int]) -> None:
        """Others, for some were restarted."""
        self._pids = tuple(pids)
        self._take()

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_S)
            self._take()

    def granted(self, start: float, seconds: float) -> float:
        """The longest wait of one process between `start` and `seconds` after it, as finely as it was sampled."""
        before = [waited for moment, waited in self._samples if moment <= start][-1]
        after = next((waited for moment, waited in self._samples if moment >= start + seconds), None)
        if after is None:
            self._take()
            after = self._samples[-1][1]
        return max((waited - before[pid] for pid, waited in after.items() if pid in before), default=0.0)

    def _take(self) -> None:
        self._samples.append((blocking_clock(), {pid: seconds_waited(pid) for pid in self._pids}))
