"""Processes of a stack, seen from outside through /proc: who they are, what they cost, where they run."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")
_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Process:
    name: str  # prefill-0, decode-0, gateway-0, nats-server
    pid: int

    def cpu_seconds(self) -> float:
        """User and system time of all its threads since it started."""
        return sum(self.user_and_system())

    def user_and_system(self) -> tuple[float, float]:
        """The parts of `cpu_seconds`."""
        # The command name may hold spaces and parentheses: fields are counted from behind it.
        fields = (PROC / str(self.pid) / "stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) / _TICKS_PER_S, int(fields[12]) / _TICKS_PER_S

    def scheduled_seconds(self) -> float:
        """The same as `cpu_seconds` as the scheduler counts it: to the nanosecond, but without threads that ended."""
        nanoseconds = 0
        for thread in (PROC / str(self.pid) / "task").iterdir():
            with contextlib.suppress(OSError):
                nanoseconds += int((thread / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9

    def memory_mb(self) -> tuple[float, float]:
        """(RSS, PSS) in MiB. PSS divides pages that processes share, such as mapped weights, among them."""
        fields = dict(
            line.split(":", 1) for line in (PROC / str(self.pid) / "smaps_rollup").read_text().splitlines()[1:]
        )
        return int(fields["Rss"].split()[0]) / 1024, int(fields["Pss"].split()[0]) / 1024

    def pin(self, cores: Iterable[int]) -> None:
        """Move all its threads; threads that it starts later inherit the cores."""
        for thread in (PROC / str(self.pid) / "task").iterdir():
            with contextlib.suppress(ProcessLookupError):  # a thread that has ended meanwhile
                os.sched_setaffinity(int(thread.name), set(cores))


def descendants(pid: int) -> list[int]:
    """All processes below `pid`, parents before children."""
    found: list[int] = []
    for thread in _list(PROC / str(pid) / "task"):
        with contextlib.suppress(OSError):
            for child in (thread / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def stack_processes(supervisor: int) -> list[Process]:
    """The services and the NATS server that a `kvferry up` has started, by their command lines."""
    found = []
    for pid in descendants(supervisor):
        with contextlib.suppress(OSError):
            arguments = (PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if Path(arguments[0]).name == "nats-server":
                found.append(Process("nats-server", pid))
            elif any(argument.startswith("kvferry_") for argument in arguments) and "--name" in arguments:
                found.append(Process(arguments[arguments.index("--name") + 1], pid))
    return found


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
