"""Time from `make run` to ready with a warm cache, and the memory of each process."""

from __future__ import annotations

import statistics
from typing import Final

from bench.options import Options
from bench.report import Report
from bench.stack import running

ROUNDS: Final = 3


async def measure(options: Options) -> Report:
    report = Report("startup", {"cache": "warm: installed, model fetched and imported"})
    times = []
    for round_index in range(1 if options.quick else ROUNDS):
        async with running(options, through_make=True) as stack:
            times.append(stack.ready_s)
            if round_index == 0:
                for process in await stack.processes():
                    rss, pss = process.memory_mb()
                    report.add(f"memory: {process.name}", rss, "MiB")
                    report.raw[f"pss_mib {process.name}"] = round(pss, 1)
    report.add("make run to ready, median", statistics.median(times), "s")
    report.raw["ready_s"] = times
    return report
