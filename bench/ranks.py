"""What tensor-parallel ranks cost and bring: two of one thread each, beside one rank of two threads and of one.

    prefill, decode   as in `bench.engine`, the native engine in bf16
    exchange          the bare barrier; write, barrier and read of what a layer exchanges, at 1 and 512 rows, beside a
                      memcpy of the same bytes; and what share of a step those exchanges take that are made for the
                      sake of one order of summation at every degree (`kvferry.engine.ranks.shard`). An upper bound:
                      in a step the columns are computed where they are read, and nothing is copied
    copies            of 2,048 tokens' KV from blocks into frames and back, of a worker of two ranks beside one
    hand-off          of as many tokens over TCP, from the accepted request to the runnable sequence: 1 to 2 ranks and 2
                      to 1 beside 1 to 1

All take turns in every round and the best counts, as there. The ranks are processes, as a worker has them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Final

import uvloop

from bench.engine import CHUNK, MAX_MODEL_LEN, MEASURES, NUM_BLOCKS, Contestant, add_rates, tables
from bench.ranks_ends import hand_offs, ranked
from bench.ranks_exchange import Ranks, exchanges
from bench.report import Report
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library, LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.runtime import blocking_clock
from kvferry.transport.slots import SlotPool
from kvferry.wire.frame import HEADER_BYTES, Piece

ONE: Final = "1 rank, 1 thread"
THREADS: Final = "1 rank, 2 threads"
RANKS: Final = "2 ranks, 1 thread each"
TOKENS: Final = 2048
FRAME_TOKENS: Final = 512
NUM_SLOTS: Final = 16
ROUNDS: Final = 3  # with what else there is, less than 5 minutes
HAND_OFF: Final = 1.15  # times what it takes without ranks
ONE_ORDER: Final = 0.1  # of a step, at most
TRANSPORT: Final = "tcp"
DEGREES: Final = ((1, 1), (1, 2), (2, 1))  # of P and D
HAND_OFFS: Final = 16  # of each round
WARM_UP: Final = 6  # left out: pools and slots are written for the first time


def staging_slots() -> list[memoryview]:
    """As a worker has them: frames that begin elsewhere in a cache line are copied more slowly."""
    pool = SlotPool(NUM_SLOTS)
    return [slot.view for _ in range(NUM_SLOTS) if (slot := pool.try_acquire("bench")) is not None]


def copy_seconds(runner: NativeRunner, slots: Sequence[memoryview]) -> dict[str, float]:
    """gather, scatter: seconds of all frames of TOKENS tokens."""
    kv = runner.kv_format
    (table,) = tables(runner, 1, TOKENS)
    pieces = [
        Piece(layer, layer + 10, at, at + FRAME_TOKENS, 0, kv.num_kv_heads)
        for at in range(0, TOKENS, FRAME_TOKENS)
        for layer in range(0, kv.num_layers, 10)
    ]
    seconds = {}
    for name, move in (("gather", runner.gather), ("scatter", runner.scatter)):
        began = blocking_clock()
        for piece, frame in zip(pieces, slots, strict=False):
            move(piece, table, frame[HEADER_BYTES:][: piece.num_bytes(kv.head_dim, kv.dtype)])
        seconds[name] = blocking_clock() - began
    return seconds


def add_exchanges(report: Report, library: Library, config: ModelConfig, step: Mapping[int, tuple[str, float]]) -> None:
    """`step`: rows -> what such a step of two ranks is called, and its seconds."""
    ranks = Ranks(library, 2)
    try:
        report.add("a barrier of 2 ranks", ranks.barrier() * 1e6, "µs")
        for rows, (name, seconds) in step.items():
            layer = {columns: ranks.exchange(rows, columns.width) for columns in exchanges(config)}
            whole = sum(taken.together for taken in layer.values())
            alone = sum(taken.alone for taken in layer.values())
            exact = sum(taken.together for columns, taken in layer.items() if columns.exact)
            rows_of = f"{rows} row{'s' if rows > 1 else ''}"
            report.add(f"a layer's exchange, {rows_of}", whole * 1e6, "µs")
            report.add(f"a layer's exchange, {rows_of}: ÷ memcpy of the same bytes", whole / alone)
            share = exact * config.num_layers / seconds
            report.add(f"one order at every degree, {name}: share of a step", share, limit=ONE_ORDER)
            report.raw[f"exchange, {rows_of}"] = {
                columns.name: {"together": taken.together, "alone": taken.alone} for columns, taken in layer.items()
            }
    finally:
        ranks.close()


def measure(settings: EngineSettings, rounds: int) -> Report:
    library = open_library()
    config = ModelConfig.read(settings.model_dir)
    report = Report("ranks", {"instruction set": library.isa, "rounds": f"best of {rounds}, interleaved"})
    with ExitStack() as stack:
        single = {
            name: NativeRunner(replace(settings, threads=threads), library=library)
            for name, threads in ((ONE, 1), (THREADS, 2))
        }
        for alone in single.values():
            stack.callback(alone.close)
        runners = {**single, RANKS: stack.enter_context(ranked(replace(settings, threads=1), 2))}
        contestants = {name: Contestant(name, runner) for name, runner in runners.items()}
        slots = staging_slots()
        copies: dict[str, dict[str, float]] = {name: {} for name in runners}
        for runner in runners.values():
            runner.warm_up()
        for _ in range(rounds):
            for name, each in contestants.items():
                each.take_turn()
                for what, seconds in copy_seconds(runners[name], slots).items():
                    copies[name][what] = min(copies[name].get(what, float("inf")), seconds)
        memory = [size / 1e6 for size in runners[RANKS].rank_weight_bytes]
    add_rates(report, contestants)
    for what in MEASURES:
        report.add(f"{what}: {RANKS} ÷ {THREADS}", contestants[RANKS].rate(what) / contestants[THREADS].rate(what))
    for rank, size in enumerate(memory):
        report.add(f"weights of rank {rank} of 2", size, "MB")
    report.add("one rank's weights", single[ONE].weight_bytes / 1e6, "MB")
    for what in ("gather", "scatter"):
        ratio = copies[RANKS][what] / copies[ONE][what]
        report.add(f"KV of {TOKENS} tokens, {what}: 1 rank", copies[ONE][what] * 1e3, "ms")
        report.add(f"KV of {TOKENS} tokens, {what}: 2 ranks ÷ 1", ratio, limit=HAND_OFF)
    # What a decode step of two ranks takes beside half of one rank's, over the layers.
    step, half = contestants[RANKS].seconds["decode 1"], contestants[ONE].seconds["decode 1"] / 2
    report.add("decode 1, a layer: beyond half of one rank's", (step - half) / config.num_layers * 1e6, "µs")
    add_exchanges(report, library, config, {
        rows: (what, contestants[RANKS].seconds[what]) for rows, what in ((1, "decode 1"), (CHUNK, "prefill 512"))
    })  # fmt: skip
    whole: dict[tuple[int, int], list[float]] = {degrees: [] for degrees in DEGREES}
    for _ in range(rounds):
        for degrees, taken in whole.items():
            found = uvloop.run(hand_offs(settings.model_dir, TRANSPORT, TOKENS, HAND_OFFS, degrees))
            taken.append(statistics.median(found[WARM_UP:]))
    for (prefill, decode), taken in whole.items():
        name = f"hand-off of {TOKENS} tokens, {prefill} to {decode}"
        report.add(name, min(taken) * 1e3, "ms")
        if (prefill, decode) != DEGREES[0]:
            report.add(f"{name} ÷ 1 to 1", min(taken) / min(whole[DEGREES[0]]), limit=HAND_OFF)
    report.raw["hand-offs"] = {f"{prefill} to {decode}": taken for (prefill, decode), taken in whole.items()}
    report.raw["seconds"] = {name: each.seconds for name, each in contestants.items()} | {"copies": copies}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    settings = EngineSettings(args.model, num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN)
    try:
        report = measure(settings, args.rounds)
    except LibraryUnavailable as error:
        print(f"native: {error}", file=sys.stderr)
        return 1
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
