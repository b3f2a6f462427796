"""The simulation's programs: `python tests/simulation COMMAND --help`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]


def seed_command(arguments: argparse.Namespace) -> int:
    from faults import load
    from seed import FailedSeed, play

    faults = None if arguments.faults is None else load(arguments.faults)
    for seed in arguments.seeds:
        try:
            story = play(seed, faults, arguments.requests)
        except FailedSeed as failure:
            if arguments.trace:
                raise
            print(failure, file=sys.stderr)
            return 1
        print(seed, story.digest, f"{story.num_steps} steps, {story.num_requests} requests, {story.cpu_s:.2f} s")
        if arguments.verbose:
            print(story)
    return 0


def sweep_command(arguments: argparse.Namespace) -> int:
    from sweep import sweep

    failed = sweep(
        arguments.first,
        arguments.seeds,
        arguments.processes,
        first_failure=arguments.first_failure,
        record=arguments.record,
    )
    return min(1, failed)


def plants_command(arguments: argparse.Namespace) -> int:
    from plants import search

    return min(1, search(arguments.processes))


def mutate_command(arguments: argparse.Namespace) -> int:
    from mutations import mutate

    mutate(arguments.draw, arguments.count, arguments.processes, resume=arguments.resume)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("seed", help="run seeds, each exactly as always")
    one.add_argument("seeds", type=int, nargs="+")
    one.add_argument("--faults", help="another schedule of faults, as a failure prints it")
    one.add_argument("--requests", type=int, default=44)
    one.add_argument("--trace", action="store_true", help="raise what fails")
    one.add_argument("--verbose", action="store_true")
    one.set_defaults(run=seed_command)
    many = commands.add_parser("sweep", help="run many seeds")
    many.add_argument("--seeds", type=int, default=500)
    many.add_argument("--first", type=int, default=0)
    many.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    many.add_argument("--first-failure", action="store_true", help="end with the first seed that fails")
    many.add_argument("--record", type=Path, help="a file to keep, and to go on from where the sources are the same")
    many.set_defaults(run=sweep_command)
    plants = commands.add_parser("plants", help="look for the seeds that find planted bugs")
    plants.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    plants.set_defaults(run=plants_command)
    mutations = commands.add_parser("mutate", help="plant small bugs by chance and look who notices")
    mutations.add_argument("--draw", type=int, default=1, help="the seed that they are drawn from")
    mutations.add_argument("--count", type=int, default=40)
    mutations.add_argument("--resume", action="store_true", help="leave out what the results have already")
    mutations.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    mutations.set_defaults(run=mutate_command)
    arguments = parser.parse_args()
    result: int = arguments.run(arguments)
    return result


if __name__ == "__main__":
    sys.exit(main())
