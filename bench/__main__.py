"""`python -m bench [NAME …]`: run benchmarks one after the other, print their figures, write JSON."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from bench import (
    chaos,
    handoff,
    handoff_cost,
    idle,
    interference,
    memory,
    page,
    parity,
    serving,
    startup,
    token_time,
    versus,
)
from bench.options import Benchmark, Options
from bench.report import Report

STACK: Final[Mapping[str, Benchmark]] = {
    "startup": startup.measure,
    "idle": idle.measure,
    "handoff": handoff.measure,
    "handoff_cost": handoff_cost.measure,
    "interference": interference.measure,
    "parity": parity.measure,
    "parity_kill": parity.measure_with_a_kill,
    "versus": versus.measure,
    "token_time": token_time.measure,
    "serving": serving.measure,
    "memory": memory.measure,
}
# Only when they are asked for by name: they take minutes, and measure survival rather than speed.
APART: Final[Mapping[str, Benchmark]] = {"chaos": chaos.measure}


def _rounds(options: Options) -> list[str]:
    return ["--rounds", "1"] if options.quick else []


# Programs of their own, so that nothing of this process shares their cores' caches or their UCX settings.
PROGRAMS: Final[Mapping[str, Callable[[Options], list[str]]]] = {
    "engine": lambda options: ["-m", "bench.engine", str(options.model_dir)],
    "isas": lambda options: ["-m", "bench.isas", str(options.model_dir), *_rounds(options)],
    "ranks": lambda options: ["-m", "bench.ranks", str(options.model_dir), *_rounds(options)],
    "chunks": lambda options: ["-m", "bench.chunks", str(options.model_dir)],
    "accuracy": lambda options: ["-m", "bench.accuracy", str(options.model_dir)],
    "grammar": lambda options: ["-m", "bench.grammar", str(options.model_dir), *_rounds(options)],
    "transport": lambda options: ["-m", "bench.transport"],
    "gateway": lambda options: ["-m", "bench.gateway", str(options.model_dir), *(["--quick"] if options.quick else [])],
    "tracing": lambda options: ["-m", "bench.tracing", str(options.model_dir), *(["--quick"] if options.quick else [])],
    "placement": lambda options: ["-m", "bench.placement", *(["--quick"] if options.quick else [])],
    "autoscale": lambda options: ["-m", "bench.autoscale", *(["--quick"] if options.quick else [])],
}
PAGE: Final = "page"  # measures nothing: makes docs/performance.md of what is written
NAMES: Final = (*PROGRAMS, *STACK, PAGE)  # that run unless some are named


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = (*NAMES, *APART)
    names_help = f"of {', '.join(known)}; all but {', '.join(APART)} unless given"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names_help)
    parser.add_argument("--quick", action="store_true", help="few samples: a smoke test, no figures to quote")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long chaos injects faults; 10 unless given")
    arguments = parser.parse_args()
    names = arguments.names or list(NAMES)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"no benchmark is named {unknown[0]!r}; there are {', '.join(known)}")
    options = Options.from_environment(arguments.quick, arguments.minutes)
    missed = [name for name in names if not run(name, options)]
    if missed:
        print(f"\nfailed, or a limit was missed: {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


def run(name: str, options: Options) -> bool:
    """Whether it ran and its limits hold. One that fails does not keep the others from running."""
    if name == PAGE:
        print("\n".join(["", *(f"written: {os.path.relpath(path)}" for path in page.write())]))
        return True
    if name in PROGRAMS:
        print(f"\n== {name} ==", flush=True)
        root = Path(__file__).resolve().parent.parent
        return subprocess.run([sys.executable, *PROGRAMS[name](options)], cwd=root, check=False).returncode == 0
    try:
        report = asyncio.run(_measured(name, options))
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        print(f"\n== {name} ==\n   failed: {type(error).__name__}: {error}", *notes, sep="\n", flush=True)
        return False
    print(report.render(), flush=True)
    if not options.quick:
        print(f"   written to {os.path.relpath(report.write())}; repeat: python -m bench {name}", flush=True)
    return report.holds


async def _measured(name: str, options: Options) -> Report:
    return await {**STACK, **APART}[name](options)


if __name__ == "__main__":
    sys.exit(main())
