"""A recorded load on whole servers: `kvferry bench` plays the same part of a trace on each of them, in turn.

Needs KVFERRY_TRACES. With PEERS, llama.cpp and vLLM are asked, too, and stand still while another is. Every round has
prompts of its own, so that none is cached from the round before; figures are medians of the rounds'.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from bench import rivals, traces
from bench.contenders import Server, as_server, frozen
from bench.options import MODEL_NAME, Options
from bench.report import Report
from bench.stack import HOST, running

REQUESTS: Final = 100
QUICK_REQUESTS: Final = 8
ROUNDS: Final = 3
QUICK_ROUNDS: Final = 1
RATE: Final = 2.0  # a second on average; the trace's own bursts stay
LENGTH_SCALE: Final = 0.25  # of its prompts and outputs: two cores are no GPU
WARM_UP: Final = 8  # requests
SHOWN: Final = (("TTFT", "p50"), ("TTFT", "p99"), ("TPOT", "p50"), ("ITL", "p99"), ("ITL", "max"))
PERCENT: Final = 100.0
MS: Final = 1e3

Summary = dict[str, Any]  # as `kvferry bench` writes it


async def measure(options: Options) -> Report:
    """Raises LookupError or FileNotFoundError without a trace."""
    trace = traces.folder() / traces.AZURE
    rounds, requests = (QUICK_ROUNDS, QUICK_REQUESTS) if options.quick else (ROUNDS, REQUESTS)
    report = Report(
        "serving",
        {
            "load": f"{requests} requests of {traces.AZURE}, lengths × {LENGTH_SCALE:g}, {RATE:g} a second on average",
            "cores": "0 and 1, for server and client",
            "rounds": f"{rounds}, interleaved; medians",
        },
    )
    async with AsyncExitStack() as stack:
        servers = await _servers(options, stack)
        for server in servers:
            await _play(server, servers, trace, WARM_UP, seed=rounds)
        found: dict[str, list[Summary]] = {server.name: [] for server in servers}
        for number in range(rounds):
            for server in servers:
                found[server.name].append(await _play(server, servers, trace, requests, seed=number))
    for name, summaries in found.items():
        _add(report, name, summaries)
    report.raw = found
    return report


async def _servers(options: Options, stack: AsyncExitStack) -> list[Server]:
    servers = [await stack.enter_async_context(server) for server in (_apart(options), _single(options))]
    for name, launched in _rivals(options.peers):
        with frozen(servers):
            servers.append(as_server(name, await stack.enter_async_context(launched)))
    return servers


def _rivals(peers: Path | None) -> Iterator[tuple[str, AbstractAsyncContextManager[rivals.Rival]]]:
    if peers is not None and rivals.available(peers, "vllm"):
        yield "vLLM P/D, 1 + 1 cores", rivals.vllm_apart(peers)
        yield "vLLM, 2 cores", rivals.vllm(peers)
    if peers is not None and rivals.available(peers, "llama"):
        yield "llama.cpp, 2 cores", rivals.llama(peers, "BF16")


@asynccontextmanager
async def _apart(options: Options) -> AsyncIterator[Server]:
    async with running(options, "--threads", "1") as stack:
        await stack.pin({"prefill": [0], "decode": [1], "": [0]})
        yield Server("kvferry, 1 + 1 cores", stack.port)


@asynccontextmanager
async def _single(options: Options) -> AsyncIterator[Server]:
    async with running(options, "--threads", "2", "--prefill", "0") as stack:
        yield Server("kvferry, one worker, 2 cores", stack.port)


async def _play(server: Server, servers: list[Server], trace: Path, requests: int, seed: int) -> Summary:
    """Raises RuntimeError if `kvferry bench` fails, or a request does."""
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder, frozen(servers, but=server):
        file = Path(folder) / "load.json"
        process = await asyncio.create_subprocess_exec(
            str(Path(sys.executable).with_name("kvferry")), "bench",
            *("--url", f"http://{HOST}:{server.port}", "--model", MODEL_NAME),
            *("--trace", str(trace), "--length-scale", str(LENGTH_SCALE), "--rate", str(RATE)),
            *("--requests", str(requests), "--seed", str(seed), "--ignore-eos", "--json", str(file)),
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await process.communicate()
        summary: Summary = json.loads(file.read_text())["summary"] if file.exists() else {"num_whole": 0}
    if summary["num_whole"] < requests:
        raise RuntimeError(f"{server.name}: {said.decode(errors='replace')}")
    return summary


def _add(report: Report, name: str, summaries: list[Summary]) -> None:
    report.add(f"{name}: goodput", statistics.median(summary["goodput"] for summary in summaries) * PERCENT, "%")
    for what, column in SHOWN:
        seconds = statistics.median(summary[what.lower()][column] for summary in summaries)
        report.add(f"{name}: {what} {column}", seconds * MS, "ms")
