"""Speed of the engines alone: one runner in this process, no scheduler, no bus.

    prefill  tok/s of one prompt of 512 and of 2,048 tokens, in chunks of 512, into an empty cache
    decode   tok/s of 1, 4 and 8 streams at a context of 256, greedy and seeded

Each figure is the median of several rounds after a warm-up. Run it alone on its cores. The native figures stand
beside the machine's own limits, measured in the same run on one thread (`bench/machine.py`): prefill against
multiply-adds that stay in registers, decode of one stream against reading memory.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np

from bench.machine import Machine, decode_bytes, prefill_flops
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, Draw, ModelRunner, SequenceStep, StepPlan
from kvferry.wire.messages import Sampling

CHUNK: Final = 512
CONTEXT: Final = 256
ENGINES: Final = ("native", "torch")


def prompt(length: int, vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab_size, length, dtype=np.uint32)


def tables(runner: ModelRunner, count: int, tokens: int) -> list[BlockTable]:
    """Disjoint block tables in a scattered order, as a pool in use hands them out."""
    per_sequence = -(-tokens // runner.kv_format.block_size)
    blocks = np.random.default_rng(1).permutation(runner.num_blocks).astype(np.int32)
    return [blocks[i * per_sequence : (i + 1) * per_sequence] for i in range(count)]


def prefill_seconds(runner: ModelRunner, length: int) -> float:
    tokens = prompt(length, runner.vocab_size)
    (table,) = tables(runner, 1, length)
    seconds = 0.0
    for start in range(0, length, CHUNK):
        end = min(start + CHUNK, length)
        draw = Draw(Sampling(temperature=0), 0, 0) if end == length else None
        step = SequenceStep(0, tokens[start:end], start, table, draw)
        seconds += runner.execute(StepPlan((step,))).seconds
    return seconds


def decode_seconds(runner: ModelRunner, streams: int, steps: int, sampling: Sampling) -> float:
    """Seconds of one step."""
    block_tables = tables(runner, streams, CONTEXT + steps + 1)
    tokens = prompt(CONTEXT, runner.vocab_size)
    for index, table in enumerate(block_tables):
        runner.execute(StepPlan((SequenceStep(index, tokens, 0, table),)))
    current: list[int] = [1] * streams
    seconds = []
    for step in range(steps):
        plan = StepPlan(
            tuple(
                SequenceStep(
                    index,
                    np.asarray([current[index]], np.uint32),
                    CONTEXT + step,
                    table,
                    Draw(sampling, 0, step),
                )
                for index, table in enumerate(block_tables)
            )
        )
        result = runner.execute(plan)
        current = [token for token in result.tokens if token is not None]
        seconds.append(result.seconds)
    return statistics.median(seconds)


def median(rounds: int, measure: Callable[[], float]) -> float:
    return statistics.median(measure() for _ in range(rounds))


def make(engine: str, settings: EngineSettings) -> ModelRunner:
    if engine == "native":
        return NativeRunner(settings)
    from kvferry.engine.torch_runner import TorchRunner

    return TorchRunner(settings)


def measure(engine: str, settings: EngineSettings, rounds: int, steps: int) -> None:
    """Print one engine's figures, the native one's with their share of the machine."""
    started = blocking_clock()
    runner = make(engine, settings)
    loaded = blocking_clock()
    runner.warm_up()
    warm = blocking_clock()
    print(f"\n{engine}: load {loaded - started:.2f} s, warm-up {warm - loaded:.2f} s, {runner.numerics_id}")
    config = ModelConfig.read(settings.model_dir)
    # The limits are those of one thread and of bf16.
    compared = engine == "native" and settings.threads == 1 and settings.quantization == "none"
    machine = Machine.measured(open_library(settings.isa)) if compared else None
    if machine is not None:
        print(f"the machine: {machine.flops / 1e9:.0f} GFLOP/s in registers, {machine.read / 1e9:.1f} GB/s read")
    for length in (512, 2048):
        seconds = median(rounds, lambda length=length: prefill_seconds(runner, length))  # type: ignore[misc]
        share = f", {prefill_flops(config, length) / seconds / machine.flops:.2f} of the machine" if machine else ""
        print(f"prefill {length:5d} tokens: {length / seconds:7.0f} tok/s{share}", flush=True)
    for name, sampling in (("greedy", Sampling(temperature=0)), ("seeded", Sampling(temperature=0.8, seed=1))):
        for streams in (1, 4, 8):
            seconds = decode_seconds(runner, streams, steps, sampling)
            share = ""
            if machine is not None and streams == 1:
                share = f", {decode_bytes(config) / seconds / machine.read:.2f} of the machine"
            line = f"decode {streams} streams, {name}: {streams / seconds:7.1f} tok/s, {seconds * 1e3:.2f} ms a step"
            print(line + share, flush=True)
    runner.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="one or both; both unless given")
    parser.add_argument("--quantization", choices=("none", "int8"), default="none", help="of the native engine")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of the torch engine")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()
    settings = EngineSettings(
        args.model, dtype=args.dtype, num_blocks=512, max_model_len=4096, threads=args.threads
    )  # fmt: skip
    own = {
        "native": replace(settings, quantization=args.quantization),
        "torch": replace(settings, device=args.device),
    }
    for engine in args.engine or ENGINES:
        try:
            measure(engine, own[engine], args.rounds, args.steps)
        except LibraryUnavailable as error:
            print(f"\nnative: {error}")
    engines = " ".join(f"--engine {engine}" for engine in args.engine or ENGINES)
    print(
        f"\nrepeat: OMP_NUM_THREADS={args.threads} python -m bench.engine {args.model} {engines} "
        f"--quantization {args.quantization} --threads {args.threads} --device {args.device} --dtype {args.dtype} "
        f"--rounds {args.rounds} --steps {args.steps}"
    )


if __name__ == "__main__":
    main()
