"""The worked examples of docs/operations.md, computed by the code that sizes a worker and from what was measured."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Final

from kvferry.engine.settings import EngineSettings, resolved_num_blocks
from kvferry.schedule.step import KVFormat
from kvferry.worker.settings import WorkerSettings

ENGINE_RESULTS: Final = Path(__file__).parents[1] / "bench" / "results" / "engine.json"
MIB: Final = 1 << 20
BLOCK_SIZE: Final = WorkerSettings.model_fields["block_size"].get_default()
# Layers, KV heads, head size; and a pool.
SHAPES: Final = {
    "SmolLM2-135M": (KVFormat(30, 3, 64, "bfloat16", BLOCK_SIZE, ""), 512),
    "Qwen2.5-7B": (KVFormat(28, 4, 128, "bfloat16", BLOCK_SIZE, ""), 16 * 1024),
    "Llama-3.1-8B": (KVFormat(32, 8, 128, "bfloat16", BLOCK_SIZE, ""), 16 * 1024),
}
SEQUENCE_TOKENS: Final = 2048 + 256

# The load of the fleet's example.
REQUESTS_PER_S: Final = 2.0
PROMPT_TOKENS: Final = 512
OUTPUT_TOKENS: Final = 128
HEADROOM: Final = 0.8  # of what a worker gives, as in scaling.yaml


def num_blocks(shape: KVFormat, kv_memory_mb: int) -> int:
    settings = EngineSettings(Path(), kv_cache_bytes=kv_memory_mb * MIB, block_size=shape.block_size)
    return resolved_num_blocks(settings, shape)


def blocks_of(num_tokens: int) -> int:
    return math.ceil(num_tokens / BLOCK_SIZE)


def kv_table() -> str:
    """A row for each shape, in bfloat16."""
    rows = [
        f"| model, layers × KV heads × head size | bytes per token | block of {BLOCK_SIZE} tokens | `kv_memory_mb` | "
        f"blocks | tokens | "
        f"sequences of {SEQUENCE_TOKENS:,} tokens |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (shape, pool) in SHAPES.items():
        blocks = num_blocks(shape, pool)
        cells = (
            f"{name}, {shape.num_layers} × {shape.num_kv_heads} × {shape.head_dim}",
            f"{shape.token_bytes:,}", f"{shape.token_bytes * BLOCK_SIZE // 1024:,} KiB", f"{pool:,}",
            f"{blocks:,}", f"{blocks * BLOCK_SIZE:,}", f"{blocks // blocks_of(SEQUENCE_TOKENS):,}",
        )  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def measured(figure: str) -> float:
    """Of the native engine in bf16 on one thread, tokens per second (`python -m bench engine`)."""
    name = f"native bf16, 1 thread: {figure}"
    figures = json.loads(ENGINE_RESULTS.read_text())["figures"]
    return next(float(row["value"]) for row in figures if row["name"] == name)


def fleet_table() -> str:
    """How many workers of one thread each a load takes."""
    prefill, decode = measured("prefill 512"), measured("decode 8")
    arriving, leaving = REQUESTS_PER_S * PROMPT_TOKENS, REQUESTS_PER_S * OUTPUT_TOKENS
    rows = [
        "| role | asked for | one worker gives | workers |",
        "|---|---|---|---|",
        f"| prefill | {REQUESTS_PER_S:g} requests/s × {PROMPT_TOKENS} tokens = {arriving:,.0f} tokens/s | "
        f"{prefill:,.0f} tokens/s, of which {HEADROOM:.0%} | {workers(arriving, prefill)} |",
        f"| decode | {REQUESTS_PER_S:g} requests/s × {OUTPUT_TOKENS} tokens = {leaving:,.0f} tokens/s | "
        f"{decode:,.0f} tokens/s with 8 streams, of which {HEADROOM:.0%} | {workers(leaving, decode)} |",
    ]
    return "\n".join(rows)


def workers(asked_for: float, given: float) -> int:
    return math.ceil(asked_for / (given * HEADROOM))
