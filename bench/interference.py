"""How much an arriving long prompt disturbs streams that decode: disaggregated against a single worker.

Four streams decode over two windows of equal length, first alone, then while a 2,048-token prompt that
generates 32 tokens arrives on the clock. The figure is the worst gap of any stream while each arrival is in
flight, divided by the streams' p99 gap when undisturbed: the p99 of the whole window would be decided by
chance, as stalls are about one gap in a hundred.

With PEERS set, `$PEERS/interference.py` measures, so that kvferry and its peers are judged by one client.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from bench.options import MODEL_NAME, Options
from bench.prompts import Prompts
from bench.report import Report, percentile
from bench.stack import Stack, metric, running
from kvferry.runtime import blocking_clock
from kvferry_local.bench.stream import Stream

STREAMS: Final = 4
STREAM_PROMPT: Final = 64
STREAM_TOKENS: Final = 256
BURST_PROMPT: Final = 2048
BURST_TOKENS: Final = 32
BURST_EVERY_S: Final = 5.0  # more than P on one core takes, so that no arrival meets the one before it
BURSTS: Final = 20
TRIAL_BURSTS: Final = 5  # to find the single worker's best chunk size
QUICK_BURSTS: Final = 3
LEAD_S: Final = 1.5  # until all streams decode
LIMIT: Final = 1.5
CHUNK_SIZES: Final = (64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Interference:
    """Milliseconds."""

    undisturbed_p99: float
    stalls: tuple[float, ...]  # worst gap per arrival
    burst_tokens: int  # prompt tokens of all arrivals

    @property
    def median_ratio(self) -> float:
        return statistics.median(self.stalls) / self.undisturbed_p99

    @property
    def worst_ratio(self) -> float:
        return max(self.stalls) / self.undisturbed_p99


async def measure(options: Options) -> Report:
    bursts = QUICK_BURSTS if options.quick else BURSTS
    client = "interference.py of the peers" if options.peers else "bench/interference.py"
    report = Report(
        "interference",
        {
            "disaggregated": "P on core 0, D on core 1, 1 thread each; gateway, NATS and client on core 0",
            "single worker": "2 threads on cores 0 and 1; gateway, NATS and client on both",
            "arrivals": f"{bursts}, one every {BURST_EVERY_S:g} s",
            "client": client,
        },
    )
    judge = _judge(options)
    apart = {"local_prefill_threshold": "0"}  # the pair is what is measured, not the choice to use it
    async with running(options, "--threads", "1", settings=apart) as stack:
        await stack.pin({"prefill": [0], "decode": [1], "": [0]})
        _add(report, "disaggregated", await _with_transfer_check(stack, judge, bursts), LIMIT)

    async def one(chunk: int, count: int) -> Interference:
        settings = {"max_num_batched_tokens": str(chunk)}
        async with running(options, "--threads", "2", "--prefill", "0", "--decode", "1", settings=settings) as single:
            return await judge(single, count, None)

    trials = {chunk: await one(chunk, min(bursts, TRIAL_BURSTS)) for chunk in CHUNK_SIZES}
    best = min(trials, key=lambda chunk: trials[chunk].median_ratio)
    report.raw["single worker, median ratio by chunk size"] = {
        str(chunk): round(trial.median_ratio, 2) for chunk, trial in trials.items()
    }
    _add(report, f"single worker, chunks of {best}", await one(best, bursts), None)
    return report


Judge = Callable[[Stack, int, "int | None"], Awaitable[Interference]]


def _judge(options: Options) -> Judge:
    async def by_peers(stack: Stack, bursts: int, core: int | None) -> Interference:
        assert options.peers is not None
        return await judged_by_peers(options.peers, stack.port, bursts, core)

    async def by_own(stack: Stack, bursts: int, core: int | None) -> Interference:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, cores if core is None else {core})
        try:
            return await _own_client(Prompts(options.model_dir, seed=3), stack, bursts)
        finally:
            os.sched_setaffinity(0, cores)

    return by_peers if options.peers else by_own


async def _with_transfer_check(stack: Stack, judge: Judge, bursts: int) -> Interference:
    """Without the KV of each prompt on its way to D there is nothing to be undisturbed by."""
    decode = next(row for row in await stack.workers() if row["role"] == "decode")
    before = metric(await stack.metrics("decode"), "kvferry_kv_bytes_total", direction="received")
    result = await judge(stack, bursts, 0)
    moved = metric(await stack.metrics("decode"), "kvferry_kv_bytes_total", direction="received") - before
    if moved < result.burst_tokens * decode["kv_token_bytes"]:
        raise RuntimeError(f"{result.burst_tokens} prompt tokens arrived, but only {moved:.0f} bytes of KV moved")
    return result


def _add(report: Report, name: str, result: Interference, limit: float | None) -> None:
    report.add(f"{name}: undisturbed p99 ITL", result.undisturbed_p99, "ms")
    report.add(f"{name}: worst gap per arrival, median", statistics.median(result.stalls), "ms")
    report.add(f"{name}: worst gap per arrival, maximum", max(result.stalls), "ms")
    report.add(f"{name}: median ÷ undisturbed p99", result.median_ratio, "", limit)
    report.add(f"{name}: maximum ÷ undisturbed p99", result.worst_ratio, "", limit)
    report.raw[f"{name}: stall per arrival, ms"] = [round(stall, 1) for stall in result.stalls]


async def judged_by_peers(peers: Path, port: int, bursts: int, core: int | None) -> Interference:
    """Any server on a port, by the peers' own client, on one core unless None."""
    script = str(peers / "interference.py")
    flags = {
        "--port": port, "--model": MODEL_NAME, "--streams": STREAMS, "--prompt-len": STREAM_PROMPT,
        "--max": STREAM_TOKENS, "--burst-len": BURST_PROMPT, "--burst-max": BURST_TOKENS,
        "--burst-every": BURST_EVERY_S, "--bursts": bursts,
    }  # fmt: skip
    if core is not None:
        flags["--cpu"] = core
    arguments = [str(part) for flag in flags.items() for part in flag]
    process = await asyncio.create_subprocess_exec(sys.executable, script, *arguments, stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    answer: dict[str, Any] = json.loads(output)
    if process.returncode or answer["err"]:
        raise RuntimeError(f"{script}: {answer.get('errbody', process.returncode)}")
    return Interference(
        answer["undisturbed"]["p99"], tuple(answer["stall_per_burst"]), answer["prompt_tokens"][1] * bursts
    )


async def _own_client(prompts: Prompts, stack: Stack, bursts: int) -> Interference:
    warm_up = [_stream_body(prompts, 8) for _ in range(STREAMS)]
    await asyncio.gather(*(stack.complete(body) for body in warm_up), stack.complete(_burst_body(prompts)))
    quiet, _ = await _window(prompts, stack, bursts, disturbed=False)
    gaps, arrivals = await _window(prompts, stack, bursts, disturbed=True)
    stalls = []
    for burst in arrivals:
        # Gaps that overlap the burst's time in flight, also those that it only began or ended in.
        met = [gap for end, gap in gaps if end >= burst.sent and end - gap <= burst.ended]
        stalls.append(max(met, default=0.0) * 1e3)
    p99 = percentile([gap for _, gap in quiet], 0.99) * 1e3
    return Interference(p99, tuple(stalls), BURST_PROMPT * bursts)


async def _window(
    prompts: Prompts, stack: Stack, bursts: int, *, disturbed: bool
) -> tuple[list[tuple[float, float]], list[Stream]]:
    """((arrival, gap) of every token of the streams inside the window, the bursts)."""
    streams: list[Stream] = []
    waves = asyncio.create_task(_waves(prompts, stack, streams))
    sent = []
    try:
        await asyncio.sleep(LEAD_S)
        start = blocking_clock()
        for index in range(bursts):
            if disturbed:
                sent.append(asyncio.create_task(stack.complete(_burst_body(prompts))))
            # On the clock, whether or not the one before has been answered.
            await asyncio.sleep(max(0.0, start + (index + 1) * BURST_EVERY_S - blocking_clock()))
        arrivals = await asyncio.gather(*sent)
        end = blocking_clock()
        if waves.done():
            await waves  # the streams ended: only an error can do that
    finally:
        for task in (waves, *sent):
            task.cancel()
        await asyncio.gather(waves, *sent, return_exceptions=True)
    return [gap for one in streams for gap in _gaps(one, start, end)], arrivals


def _gaps(answer: Stream, start: float, end: float) -> list[tuple[float, float]]:
    """(arrival, seconds since the arrival before) of events with both ends inside [start, end]."""
    pairs = pairwise(answer.arrivals)
    return [(later, later - earlier) for earlier, later in pairs if earlier >= start and later <= end]


async def _waves(prompts: Prompts, stack: Stack, streams: list[Stream]) -> None:
    """All streams start together; the next wave starts when all are done."""
    while True:
        wave = [Stream() for _ in range(STREAMS)]
        streams += wave
        async with asyncio.TaskGroup() as group:
            for one in wave:
                group.create_task(stack.complete(_stream_body(prompts, STREAM_TOKENS), into=one))


def _stream_body(prompts: Prompts, max_tokens: int) -> dict[str, Any]:
    return _body(prompts.tokens(STREAM_PROMPT), max_tokens)


def _burst_body(prompts: Prompts) -> dict[str, Any]:
    return _body(prompts.tokens(BURST_PROMPT), BURST_TOKENS)


def _body(prompt: list[int], max_tokens: int) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
