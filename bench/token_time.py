"""Where the time from one token to the next goes: a single worker on all cores, over HTTP, with one stream and eight.

    token to token   as the client sees it
    step             as the worker's loop sees it: to the engine's thread, the forward pass, the draw, and back
    engine alone     forward pass and draw, in this process, with nothing else on the cores
    reading          the bytes of the weights at the rate at which all cores together read memory: no step is shorter

What lies between the first two is the loop between steps: what a step gave is taken in, published, and the next one
decided. Beside them the CPU of each process, which the engine's threads share the cores with.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from typing import Final

from bench.contenders import Server, decode_rate
from bench.engine import MAX_MODEL_LEN, NUM_BLOCKS, decode_seconds
from bench.machine import decode_bytes, read_bandwidth
from bench.options import Options
from bench.prompts import Prompts
from bench.report import Report
from bench.stack import Stack, metric, running
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.library import Library, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings

STREAMS: Final = (1, 8)
PROMPT_TOKENS: Final = 256
TOKENS: Final = 192
ROUNDS: Final = 5
MS: Final = 1e3


async def measure(options: Options) -> Report:
    cores = len(os.sched_getaffinity(0))
    library = open_library("auto")
    report = Report("token_time", {"worker": f"{cores} threads on {cores} cores", "generated": f"{TOKENS} tokens each"})
    alone = await asyncio.to_thread(_engine_alone, options, library, cores)
    reading = decode_bytes(ModelConfig.read(options.model_dir)) / read_bandwidth(library, cores)
    async with running(options, "--prefill", "0", "--decode", "1", "--threads", str(cores)) as stack:
        prompts = Prompts(options.model_dir, seed=3)
        for streams in STREAMS:
            texts = [prompts.tokens(PROMPT_TOKENS) for _ in range(streams)]
            await _generate(stack, texts)  # its prefixes are cached from here on: hardly a step is a prompt's
            await _add(report, stack, texts, 1 if options.quick else ROUNDS)
            name = _name(streams)
            report.add(f"{name}: engine alone", alone[streams] * MS, "ms")
            report.add(f"{name}: reading the weights", reading * MS, "ms")
    return report


def _engine_alone(options: Options, library: Library, threads: int) -> dict[int, float]:
    """Seconds of a step, by streams."""
    settings = EngineSettings(
        options.model_dir, dtype="bfloat16", num_blocks=NUM_BLOCKS, max_model_len=MAX_MODEL_LEN, threads=threads
    )
    runner = NativeRunner(settings, library=library)
    try:
        runner.warm_up()
        return {
            streams: statistics.median(decode_seconds(runner, streams) for _ in range(ROUNDS)) for streams in STREAMS
        }
    finally:
        runner.close()


async def _add(report: Report, stack: Stack, texts: list[list[int]], rounds: int) -> None:
    name = _name(len(texts))
    processes = await stack.processes()
    before, own = await stack.metrics("decode"), time.process_time()
    cpu = {process.name: process.scheduled_seconds() for process in processes}
    between = [await _generate(stack, texts) for _ in range(rounds)]
    after, own = await stack.metrics("decode"), time.process_time() - own
    spent = {process.name: process.scheduled_seconds() - cpu[process.name] for process in processes} | {"client": own}
    steps = metric(after, "kvferry_step_seconds_count") - metric(before, "kvferry_step_seconds_count")
    seconds = metric(after, "kvferry_step_seconds_sum") - metric(before, "kvferry_step_seconds_sum")
    report.add(f"{name}: token to token", statistics.median(between) * MS, "ms")
    report.add(f"{name}: step", seconds / steps * MS, "ms")
    for process, total in spent.items():
        report.add(f"{name}: CPU of {process} per step", total / steps * MS, "ms")
    report.raw.setdefault("token to token", {})[name] = between


async def _generate(stack: Stack, texts: list[list[int]]) -> float:
    """Seconds from one token of a stream to its next, while all run."""
    server = Server("kvferry", stack.port)
    return len(texts) / decode_rate(await asyncio.gather(*(server.complete(text, TOKENS) for text in texts)))


def _name(streams: int) -> str:
    return f"{streams} stream{'s' if streams > 1 else ''}"
