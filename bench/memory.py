"""What a worker on the native engine takes beside its weights, its KV pool and its staging slots.

The pool is small and the load larger, so that the pool is in memory as a whole when the resident set is read: no
other memory can then pass for a part of it. What is left is the interpreter, the libraries, the engine's workspace
and the worker's own state. What importing torch alone takes, which this engine does not, is measured beside it.
"""

from __future__ import annotations

import asyncio
import sys
from math import prod
from pathlib import Path
from typing import Any, Final

from bench.options import Options
from bench.processes import PROC, Process
from bench.prompts import Prompts
from bench.report import Report
from bench.stack import Stack, running
from kvferry.engine.checkpoint import expected_shapes
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.wire.frame import HEADER_BYTES

NUM_BLOCKS: Final = 512
NUM_SLOTS: Final = 8
SLOT_KB: Final = 1024
PROMPT: Final = 1024
PROMPTS: Final = 24  # three times the pool
AT_ONCE: Final = 4
LEAST_RESIDENT: Final = 0.97  # of the pool
LIMIT_MB: Final = 350.0
WEIGHTS_LIMIT: Final = 1.05  # packed panels are padded
BF16_BYTES: Final = 2
MB: Final = 1e6
TORCH: Final = """
from pathlib import Path
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])
before = resident()
import torch
import resource
print((resident() - before) * resource.getpagesize())
"""


async def measure(options: Options) -> Report:
    report = Report(
        "memory",
        {
            "load": f"{PROMPTS} prompts of {PROMPT} tokens, {AT_ONCE} at once, 1 prefill + 1 decode, 1 thread each",
            "pools": f"{NUM_BLOCKS} blocks, {NUM_SLOTS} slots of {SLOT_KB} KiB",
        },
    )
    weights, expected = weight_bytes(options.model_dir)
    settings = {
        "num_blocks": str(NUM_BLOCKS), "num_slots": str(NUM_SLOTS), "slot_kb": str(SLOT_KB), "engine": "native",
        "local_prefill_threshold": "0",
    }  # fmt: skip
    async with running(options, "--threads", "1", settings=settings) as stack:
        await _load(options, stack)
        for worker in await stack.workers():
            _add(report, worker, weights)
    report.add("weights ÷ the checkpoint's", weights / expected, "", WEIGHTS_LIMIT)
    report.add("weights", weights / MB, "MB")
    report.add("import torch, alone", await torch_bytes() / MB, "MB")
    return report


async def torch_bytes() -> int:
    """By how much the resident set of a bare interpreter grows."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", TORCH, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    return int(output)


def weight_bytes(model_dir: Path) -> tuple[int, int]:
    """(what the engine holds, what the checkpoint's tensors are in bf16): a tied head is the embedding itself."""
    runner = NativeRunner(EngineSettings(model_dir, num_blocks=1, max_model_len=16, threads=1))
    held = runner.weight_bytes
    runner.close()
    shapes = expected_shapes(ModelConfig.read(model_dir)).values()
    return held, sum(BF16_BYTES * prod(shape) for shape in shapes)


async def _load(options: Options, stack: Stack) -> None:
    prompts = Prompts(options.model_dir, seed=11)
    bodies = [
        {"prompt": prompts.tokens(PROMPT), "max_tokens": 32, "temperature": 0, "ignore_eos": True}
        for _ in range(PROMPTS)
    ]
    for start in range(0, PROMPTS, AT_ONCE):
        await asyncio.gather(*(stack.complete(body) for body in bodies[start : start + AT_ONCE]))


def _add(report: Report, worker: dict[str, Any], weights: int) -> None:
    process = Process(worker["name"], worker["pid"])
    pool = worker["num_blocks"] * worker["block_size"] * worker["kv_token_bytes"]
    slots = NUM_SLOTS * (HEADER_BYTES + SLOT_KB * 1024)
    resident = min(advised_bytes(process.pid), weights + pool + slots)
    if resident < weights + LEAST_RESIDENT * pool:
        raise RuntimeError(f"{process.name}: {resident / MB:.0f} MB of weights, pool and slots are resident, not all")
    rss = process.memory_mb()[0] * 1024 * 1024
    report.add(f"{process.name}: RSS", rss / MB, "MB")
    report.add(f"{process.name}: weights, KV pool and staging", resident / MB, "MB")
    report.add(f"{process.name}: RSS − weights − KV pool − staging", (rss - resident) / MB, "MB", LIMIT_MB)


def advised_bytes(pid: int) -> int:
    """Resident bytes of mappings that ask for huge pages: weights, KV pool and staging slots do, and little else."""
    total, resident = 0, 0
    for line in (PROC / str(pid) / "smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Rss":
            resident = int(value.split()[0]) * 1024
        elif name == "VmFlags" and "hg" in value.split():
            total += resident
    return total
