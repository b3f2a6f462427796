"""The whole hand-off against the bare transport: gather, checksum, transfer, check, scatter and all round trips.

Both over the same backend, between two processes on loopback, interleaved; nothing is computed meanwhile.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from asyncio.subprocess import DEVNULL, PIPE
from typing import Final

from bench.handoff_ends import idle_runner, pull
from bench.options import Options
from bench.report import Report
from bench.transport_ends import FRAME_BYTES, WINDOW, send_over_transport

NUM_TOKENS: Final = 2048
HANDOFFS: Final = 24  # of each round
WARM_UP: Final = 6  # left out: the first connects
ROUNDS: Final = 9
FRAMES: Final = 200
LIMIT: Final = 0.5
GB: Final = 1e9


async def measure(options: Options) -> Report:
    runner = idle_runner(options.model_dir, NUM_TOKENS)
    num_bytes = runner.kv_format.token_bytes * NUM_TOKENS
    report = Report(
        "handoff",
        {
            "hand-off": f"{NUM_TOKENS} tokens, {num_bytes / 1e6:.1f} MB, from accepted request to runnable sequence",
            "engine's copies": runner.numerics_id,
            "transport": f"frames of {FRAME_BYTES:,} bytes, window {WINDOW}, the same backend in the same round",
        },
    )
    for backend in ("ucx", "tcp"):
        bare, whole = [], []
        for _ in range(1 if options.quick else ROUNDS):
            bare.append(await _bare(backend))
            whole.append(await whole_rate(options, backend, num_bytes))
        ratios = [w / b for w, b in zip(whole, bare, strict=True)]
        report.add(f"{backend}: bare transport", statistics.median(bare) / GB, "GB/s")
        report.add(f"{backend}: whole hand-off", statistics.median(whole) / GB, "GB/s")
        report.add(f"{backend}: whole hand-off ÷ transport", statistics.median(ratios), "", LIMIT, at_least=True)
        report.raw[backend] = {"bare": bare, "whole": whole}
    return report


async def _bare(backend: str) -> float:
    program = ("-m", "bench.transport_ends", backend, str(FRAMES))
    receiver = await asyncio.create_subprocess_exec(sys.executable, *program, stdin=DEVNULL, stdout=PIPE)
    assert receiver.stdout is not None
    address = (await receiver.stdout.readline()).decode().strip()
    rate = await send_over_transport(backend, address, FRAMES)
    await receiver.wait()
    return rate


async def whole_rate(options: Options, backend: str, num_bytes: int) -> float:
    """Bytes per second of whole hand-offs of `NUM_TOKENS` tokens, whose KV takes `num_bytes`."""
    return num_bytes / statistics.median((await _handoffs(options, backend))[WARM_UP:])


async def _handoffs(options: Options, backend: str) -> list[float]:
    arguments = (str(options.model_dir), backend, str(NUM_TOKENS), str(HANDOFFS))
    program = ("-m", "bench.handoff_ends", *arguments)
    prefill = await asyncio.create_subprocess_exec(sys.executable, *program, stdin=DEVNULL, stdout=PIPE)
    assert prefill.stdout is not None
    address = (await prefill.stdout.readline()).decode().strip()
    seconds = await pull(idle_runner(options.model_dir, NUM_TOKENS), backend, NUM_TOKENS, HANDOFFS, address)
    await prefill.wait()
    return seconds
