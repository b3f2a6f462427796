"""Idle CPU of every process: before first use, and 10 s after a burst with client connections left open."""

from __future__ import annotations

import asyncio
from typing import Final

from bench.options import Options
from bench.processes import Process
from bench.prompts import Prompts
from bench.report import Report
from bench.stack import HOST, Stack, running

WINDOW_S: Final = 20.0
SETTLE_S: Final = 10.0
BURST: Final = 16
OPEN_CONNECTIONS: Final = 8
LIMIT: Final = 0.02  # of a core, each process


async def measure(options: Options) -> Report:
    report = Report("idle", {"window": f"{WINDOW_S:.0f} s, 1 prefill + 1 decode, not pinned"})
    async with running(options) as stack:
        processes = await stack.processes()
        await _window(report, "before first use", processes)
        await _burst(options, stack)
        connections = [await _kept_alive(stack) for _ in range(OPEN_CONNECTIONS)]
        try:
            await asyncio.sleep(SETTLE_S)
            await _window(report, "after a burst", processes)
        finally:
            for writer in connections:
                writer.close()
    return report


async def _window(report: Report, phase: str, processes: list[Process]) -> None:
    before = {process.name: process.cpu_seconds() for process in processes}
    await asyncio.sleep(WINDOW_S)
    for process in processes:
        used = (process.cpu_seconds() - before[process.name]) / WINDOW_S
        report.add(f"{phase}: {process.name}", used, "cores", LIMIT)


async def _burst(options: Options, stack: Stack) -> None:
    prompts = Prompts(options.model_dir)
    bodies = [{"prompt": prompts.tokens(256), "max_tokens": 16, "temperature": 0} for _ in range(BURST)]
    await asyncio.gather(*(stack.complete(body) for body in bodies))


async def _kept_alive(stack: Stack) -> asyncio.StreamWriter:
    """A connection that has had an answer and is kept for the next request."""
    reader, writer = await asyncio.open_connection(HOST, stack.port)
    writer.write(b"GET /health HTTP/1.1\r\nHost: idle\r\n\r\n")
    await reader.readuntil(b"}")
    return writer
