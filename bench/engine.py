"""Speed of the engines alone: runners in this process, no scheduler, no bus.

    prefill  tok/s of one prompt of 512 and of 2,048 tokens, in chunks of 512, into an empty cache
    decode   tok/s of 1 and of 8 streams at a context of 256, greedy

The native engine in bf16 and int8, on 1 and 2 threads, beside the torch engine on one. All of them, and the machine's
own limits for one thread (`bench/machine.py`), take turns in every round, and the best of the rounds counts: what else
runs on the cores then disturbs all alike, and the ratios hold on a machine that is not quiet. Blocks are scattered, as
a pool in use hands them out.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import numpy as np

from bench.machine import Machine, decode_bytes, prefill_flops
from bench.report import Report
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library, LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.schedule.step import BlockTable, Draw, ModelRunner, SequenceStep, StepPlan
from kvferry.wire.sampling import Sampling

CHUNK: Final = 512
CONTEXT: Final = 256
STEPS: Final = 16  # of decode, the fastest counts
ROUNDS: Final = 5
NUM_BLOCKS: Final = 512
MAX_MODEL_LEN: Final = 4096
GREEDY: Final = Sampling(temperature=0)
OF_THE_MACHINE: Final = 0.8  # what one thread must reach of its limits
TWO_THREADS_PREFILL: Final = 1.7  # times one thread
Measure = Callable[[ModelRunner], float]


def prompt(length: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, length, dtype=np.uint32)


def tables(runner: ModelRunner, count: int, tokens: int) -> list[BlockTable]:
    """Disjoint block tables in a scattered order."""
    per_sequence = -(-tokens // runner.kv_format.block_size)
    blocks = np.random.default_rng(1).permutation(runner.num_blocks).astype(np.int32)
    return [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(count)]


def prefill_seconds(runner: ModelRunner, length: int) -> float:
    tokens = prompt(length, runner.vocab_size)
    (table,) = tables(runner, 1, length)
    seconds = 0.0
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        draw = Draw(GREEDY, 0, 0) if end == length else None
        seconds += runner.execute(StepPlan((SequenceStep(0, tokens[start:end], start, table, draw),))).seconds
    return seconds


def decode_seconds(runner: ModelRunner, streams: int) -> float:
    """Seconds of one step, the token of each stream drawn in it."""
    block_tables = tables(runner, streams, CONTEXT + STEPS)
    tokens = prompt(CONTEXT, runner.vocab_size)
    for index, table in enumerate(block_tables):
        runner.execute(StepPlan((SequenceStep(index, tokens, 0, table),)))
    current: list[int] = [1] * streams
    best = float("inf")
    for step in range(STEPS):
        steps = (
            SequenceStep(index, np.asarray([current[index]], np.uint32), CONTEXT + step, table, Draw(GREEDY, 0, step))
            for index, table in enumerate(block_tables)
        )
        result = runner.execute(StepPlan(tuple(steps)))
        current = [token for token in result.tokens if token is not None]
        best = min(best, result.seconds)
    return best


# name -> (tokens of one measurement, its seconds)
MEASURES: Final[dict[str, tuple[int, Measure]]] = {
    "prefill 512": (512, lambda runner: prefill_seconds(runner, 512)),
    "prefill 2048": (2048, lambda runner: prefill_seconds(runner, 2048)),
    "decode 1": (1, lambda runner: decode_seconds(runner, 1)),
    "decode 8": (8, lambda runner: decode_seconds(runner, 8)),
}


@dataclass(slots=True)
class Contestant:
    name: str
    runner: ModelRunner
    seconds: dict[str, float] = field(default_factory=dict)  # the best of the rounds so far

    def take_turn(self) -> None:
        for name, (_, measure) in MEASURES.items():
            self.seconds[name] = min(self.seconds.get(name, float("inf")), measure(self.runner))

    def rate(self, name: str) -> float:
        return MEASURES[name][0] / self.seconds[name]


def add_rates(report: Report, by_name: Mapping[str, Contestant]) -> None:
    for name, each in by_name.items():
        for what in MEASURES:
            report.add(f"{name}: {what}", each.rate(what), "tok/s")


def native_name(quantization: str, threads: int) -> str:
    kind = "bf16" if quantization == "none" else quantization
    return f"native {kind}, {threads} thread{'s' if threads > 1 else ''}"


def contestants(settings: EngineSettings, library: Library, thread_counts: list[int], torch: bool) -> list[Contestant]:
    found = [
        Contestant(
            native_name(quantization, threads),
            NativeRunner(replace(settings, threads=threads, quantization=quantization), library=library),
        )
        for quantization in ("none", "int8")
        for threads in thread_counts
    ]
    if torch:
        from kvferry.engine.torch.runner import TorchRunner

        found.append(Contestant("torch, 1 thread", TorchRunner(replace(settings, threads=1))))
    return found


def limits_of(library: Library, rounds: list[Machine]) -> Machine:
    rounds.append(Machine.measured(library))
    return Machine(max(each.flops for each in rounds), max(each.read for each in rounds))


def measure(settings: EngineSettings, rounds: int, torch: bool) -> Report:
    library = open_library(settings.isa)
    config = ModelConfig.read(settings.model_dir)
    cores = len(os.sched_getaffinity(0))
    thread_counts = [1, 2] if cores > 1 else [1]
    report = Report("engine", {"instruction set": library.isa, "rounds": f"best of {rounds}, interleaved"})
    runners = contestants(settings, library, thread_counts, torch)
    for each in runners:
        each.runner.warm_up()
        report.conditions[each.name] = each.runner.numerics_id
    seen: list[Machine] = []
    machine = limits_of(library, seen)
    for _ in range(rounds):
        for each in runners:
            each.take_turn()
        machine = limits_of(library, seen)
    report.raw["seconds"] = {each.name: each.seconds for each in runners}
    report.raw["machine"] = [{"flops": each.flops, "read": each.read} for each in seen]
    add_figures(report, config, machine, {each.name: each for each in runners}, thread_counts)
    for each in runners:
        each.runner.close()
    return report


def add_figures(
    report: Report, config: ModelConfig, machine: Machine, by_name: dict[str, Contestant], thread_counts: list[int]
) -> None:
    report.add("machine, 1 thread: multiply-adds in registers", machine.flops / 1e9, "GFLOP/s")
    report.add("machine, 1 thread: reading memory", machine.read / 1e9, "GB/s")
    add_rates(report, by_name)
    one = by_name[native_name("none", 1)]
    prefill = {name: prefill_flops(config, MEASURES[name][0]) / one.seconds[name] for name in MEASURES if "pre" in name}
    for name, flops in prefill.items():
        limit = OF_THE_MACHINE if name == "prefill 512" else None
        report.add(f"{one.name}: {name} ÷ machine", flops / machine.flops, limit=limit, at_least=True)
    read = decode_bytes(config) / one.seconds["decode 1"]
    report.add(f"{one.name}: decode 1 ÷ machine", read / machine.read, limit=OF_THE_MACHINE, at_least=True)
    if len(thread_counts) > 1:
        two = by_name[native_name("none", 2)]
        wanted = {"prefill 512": TWO_THREADS_PREFILL, "decode 1": 1.0, "decode 8": 1.0}
        for name, limit in wanted.items():
            ratio = two.rate(name) / one.rate(name)
            report.add(f"native bf16: {name}, 2 threads ÷ 1", ratio, limit=limit, at_least=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--isa", default="auto", help="instruction set of the native engine")
    parser.add_argument("--no-torch", action="store_true", help="the native engine alone")
    args = parser.parse_args()
    settings = EngineSettings(args.model, isa=args.isa, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
    try:
        report = measure(settings, args.rounds, torch=not args.no_torch)
    except LibraryUnavailable as error:
        print(f"native: {error}", file=sys.stderr)
        return 1
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
