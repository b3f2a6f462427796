"""Speed of the engine alone: one runner in this process, no scheduler, no bus.

    prefill  tok/s of one prompt of 512 and of 2,048 tokens, in chunks of 512, into an empty cache
    decode   tok/s of 1, 4 and 8 streams at a context of 256, greedy

Each figure is the median of several rounds after a warm-up. Run it alone on its cores.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvferry.engine.torch_runner import EngineSettings, TorchRunner
from kvferry.runtime import blocking_clock
from kvferry.schedule.step import BlockTable, Draw, ModelRunner, SequenceStep, StepPlan
from kvferry.wire.messages import Sampling

CHUNK = 512
CONTEXT = 256


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=32)
    args = parser.parse_args()

    started = blocking_clock()
    settings = EngineSettings(
        args.model, args.device, args.dtype, num_blocks=512, max_model_len=4096, threads=args.threads
    )
    runner = TorchRunner(settings)
    loaded = blocking_clock()
    runner.warm_up()
    print(f"load {loaded - started:.2f} s, warm-up {blocking_clock() - loaded:.2f} s, {runner.numerics_id}")
    for length in (512, 2048):
        seconds = median(args.rounds, lambda length=length: prefill_seconds(runner, length))  # type: ignore[misc]
        print(f"prefill {length:5d} tokens: {length / seconds:7.0f} tok/s", flush=True)
    for name, sampling in (("greedy", Sampling(temperature=0)), ("seeded", Sampling(temperature=0.8, seed=1))):
        for streams in (1, 4, 8):
            seconds = decode_seconds(runner, streams, args.steps, sampling)
            rate = streams / seconds
            print(f"decode {streams} streams, {name}: {rate:7.1f} tok/s, {seconds * 1e3:.2f} ms a step", flush=True)
    print(
        f"repeat: OMP_NUM_THREADS={args.threads} python bench/engine.py {args.model} --threads {args.threads} "
        f"--device {args.device} --dtype {args.dtype} --rounds {args.rounds} --steps {args.steps}"
    )


if __name__ == "__main__":
    main()
