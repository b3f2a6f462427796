"""`make fuzz`: every plane by turns, or one batch again: `make fuzz ARGS="--plane http --seed 0 --batch 17"`."""

from __future__ import annotations

import argparse
import logging
import sys
import traceback
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the tests' own helpers are

import structlog
from fuzz.campaign import LEAST_VALID, Batch, Finding, campaign, run_batch
from fuzz.planes import PLANES, SIZE


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--plane", choices=PLANES, help="only this one")
    parser.add_argument("--cases", type=int, default=100_000, help="inputs in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, help="run this batch alone")
    parser.add_argument("--size", type=int, default=SIZE, help="inputs of a batch")
    arguments = parser.parse_args()
    # Each piece of garbage is a line of the log.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    planes = {name: plane for name, plane in PLANES.items() if arguments.plane in (None, name)}
    total = sum(plane.weight for plane in planes.values())
    try:
        for name, plane in planes.items():
            if arguments.batch is not None:
                run_batch(plane.run, Batch(name, arguments.seed, arguments.batch, arguments.size))
                print(f"{name}: batch {arguments.batch} found nothing")
                continue
            began = perf_counter()
            num_cases = round(arguments.cases * plane.weight / total)
            tally = campaign(name, plane.run, arguments.seed, num_cases, arguments.size, progress=True)
            print(
                f"{name}: {tally.num_cases} inputs, {tally.num_mutated} of them mutated, {tally.share_valid:.1%} of "
                f"those valid, {perf_counter() - began:.0f} s"
            )
            if tally.share_valid < LEAST_VALID:
                print(f"{name}: fewer than {LEAST_VALID:.0%} valid", file=sys.stderr)
                return 1
    except Finding as finding:
        traceback.print_exception(finding.__cause__)
        print(f"\n{finding}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
