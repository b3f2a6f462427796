"""Time from `make run` to ready with a warm cache, how much of it follows the workers' loading, and the memory.

"After the slowest worker" is the time from the moment that the last worker had imported, loaded and warmed up to
the line that says ready: it may be 2 s at most, in every round.
"""

from __future__ import annotations

import json
import statistics
from datetime import datetime
from pathlib import Path
from typing import Final

from bench.options import Options
from bench.report import Report
from bench.stack import running

ROUNDS: Final = 5
AFTER_LIMIT_S: Final = 2.0


async def measure(options: Options) -> Report:
    report = Report("startup", {"cache": "warm: installed, model fetched and imported"})
    times, after = [], []
    for round_index in range(1 if options.quick else ROUNDS):
        async with running(options, through_make=True) as stack:
            times.append(stack.ready_s)
            after.append(stack.ready_at - _last_warm(stack.log))
            if round_index == 0:
                for process in await stack.processes():
                    rss, pss = process.memory_mb()
                    report.add(f"memory: {process.name}", rss, "MiB")
                    report.raw[f"pss_mib {process.name}"] = round(pss, 1)
    report.add("make run to ready, median", statistics.median(times), "s")
    report.add("after the slowest worker was warm, median", statistics.median(after), "s")
    report.add("after the slowest worker was warm, worst", max(after), "s", AFTER_LIMIT_S)
    report.raw["ready_s"] = times
    report.raw["after_slowest_worker_s"] = after
    return report


def _last_warm(log: Path) -> float:
    """Unix seconds at which the last worker said that its model is ready."""
    entries = [json.loads(line) for line in log.read_text(errors="replace").splitlines() if line.startswith("{")]
    times = [entry["timestamp"] for entry in entries if entry.get("event") == "model ready"]
    return max(datetime.fromisoformat(time).timestamp() for time in times)
