"""How long steps are when the chunk budget sizes them, at every context up to 32k: `python -m bench.chunks MODEL_DIR`.

One thread, the native engine, stretches of prompts in an order that makes the context jump. The model is told that it
may have 32k positions; what its KV says there does not matter to the time. Before everything the budget knows nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Final

import numpy as np

from bench.report import Report, percentile
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.schedule.chunk import STEP_TARGET_S, ChunkBudget
from kvferry.schedule.step import SequenceStep, StepPlan

MAX_LEN: Final = 32_768
BLOCK: Final = 16
MAX_TOKENS: Final = 512
# (cached prefix, end)
STRETCHES: Final = (
    (0, 2048), (31_000, 31_400), (0, 512), (7000, 8192), (15_000, 15_600), (0, 2048), (31_400, 32_000),
    (3000, 4096), (23_000, 23_500),
)  # fmt: skip
LONGEST: Final = 1.5  # of the target; a step of one block takes what it takes


def longer(model_dir: Path, folder: Path) -> Path:
    """The same model with more positions."""
    for file in model_dir.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": MAX_LEN}))
    return folder


def steps(runner: NativeRunner) -> list[tuple[int, int, float]]:
    """(start, rows, seconds) of every step."""
    table = np.random.default_rng(1).permutation(runner.num_blocks).astype(np.int32)
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, MAX_LEN, dtype=np.uint32)
    budget, taken = ChunkBudget(MAX_TOKENS, BLOCK), []
    for start, end in STRETCHES:
        while start < end:
            rows = budget.step().take(start, end - start)
            plan = StepPlan((SequenceStep(0, tokens[start : start + rows], start, table),))
            seconds = runner.execute(plan).seconds
            budget.observe([(start, rows)], seconds)
            taken.append((start, rows, seconds))
            start += rows
    return taken


def measure(model_dir: Path) -> Report:
    report = Report("chunks", {"threads": "1", "stretches": ", ".join(f"{start}-{end}" for start, end in STRETCHES)})
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        settings = EngineSettings(
            longer(model_dir, Path(folder)), dtype="bfloat16", block_size=BLOCK, num_blocks=MAX_LEN // BLOCK,
            max_model_len=MAX_LEN, threads=1,
        )  # fmt: skip
        runner = NativeRunner(settings)
    runner.warm_up()
    taken = steps(runner)
    runner.close()
    seconds = [each for _, _, each in taken]
    longest = max(each for _, rows, each in taken if rows > BLOCK)
    report.add("longest step of more than a block", longest * 1e3, "ms", LONGEST * STEP_TARGET_S * 1e3)
    if small := [each for _, rows, each in taken if rows <= BLOCK]:
        report.add("longest step of one block", max(small) * 1e3, "ms")
    report.add("median step", percentile(seconds, 0.5) * 1e3, "ms")
    for near in (0, 8_000, 31_000):
        rows = [count for start, count, _ in taken if near <= start < near + 1000]
        if rows:
            report.add(f"largest chunk from position {near:,} on", max(rows), "tokens")
    report.raw["start, rows, seconds"] = [[start, rows, round(each, 4)] for start, rows, each in taken]
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model_dir", type=Path)
    report = measure(parser.parse_args().model_dir)
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
