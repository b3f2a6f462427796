"""What each instruction set is worth: the native engine on one thread, built for each that this processor has.

The measures of `bench/engine.py`, in bf16 and int8, beside torch in bf16; all take turns in every round, and the best
of the rounds counts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Final

from bench.engine import MAX_MODEL_LEN, MEASURES, NUM_BLOCKS, ROUNDS, Contestant, add_rates
from bench.report import Report
from kvferry.engine.native.cpu import cpu_flags, usable_isas
from kvferry.engine.native.library import open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner

KINDS: Final = {"bf16": "none", "int8": "int8"}
WORTH_HAVING: Final = 1.0  # what an instruction set must reach of the next best one, in everything


def contestants(settings: EngineSettings, isas: tuple[str, ...]) -> dict[str, Contestant]:
    found = {
        name: Contestant(
            name, NativeRunner(replace(settings, isa=isa, quantization=quantization), library=open_library(isa))
        )
        for isa in isas
        for kind, quantization in KINDS.items()
        for name in [f"{isa}, {kind}"]
    }
    return {**found, "torch, bf16": Contestant("torch, bf16", TorchRunner(settings))}


def measure(settings: EngineSettings, rounds: int) -> Report:
    isas = tuple(isa for isa in usable_isas(cpu_flags()) if isa != "portable")
    report = Report("isas", {"threads": "1", "rounds": f"best of {rounds}, interleaved"})
    runners = contestants(settings, isas)
    for each in runners.values():
        each.runner.warm_up()
    for _ in range(rounds):
        for each in runners.values():
            each.take_turn()
    for name, each in runners.items():
        report.conditions[name] = each.runner.numerics_id
        each.runner.close()
    add_rates(report, runners)
    for better, other in pairwise(isas):
        for kind in KINDS:
            for what in MEASURES:
                ratio = runners[f"{better}, {kind}"].rate(what) / runners[f"{other}, {kind}"].rate(what)
                report.add(f"{kind}: {what}, {better} ÷ {other}", ratio, limit=WORTH_HAVING, at_least=True)
    for what in MEASURES:
        report.add(
            f"bf16: {what}, {isas[0]} ÷ torch",
            runners[f"{isas[0]}, bf16"].rate(what) / runners["torch, bf16"].rate(what),
        )
    report.raw["seconds"] = {name: each.seconds for name, each in runners.items()}
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    settings = EngineSettings(
        args.model, dtype="bfloat16", num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, threads=1
    )
    return measure(settings, args.rounds).conclude()


if __name__ == "__main__":
    sys.exit(main())
