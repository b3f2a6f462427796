"""What tracing costs the gateway: CPU per request and per streamed token without it, with 1 % of the requests sampled,
and with all of them.

Three gateways that differ in this alone, each before workers that compute nothing, take turns in the same run; spans go
to a collector that only counts them. CPU is that of all threads of the gateway's process, encoding and sending of
spans included: each count goes on until what was recorded has left.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Final

import uvloop

from bench import gateway_runs as runs
from bench import gateway_servers as servers
from bench.gateway_clients import Clients
from bench.gateway_runs import AT_ONCE, WARM_UP, Meter
from bench.gateway_servers import Helper, Server
from bench.options import MODEL_NAME
from bench.report import Report
from kvferry.log import setup_logging

RATIOS: Final = {"off": None, "1 %": 0.01, "all": 1.0}  # share of requests that are traced; None: nothing is set up
ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
STREAMS: Final = 32
WINDOW_S: Final = 6.0
QUICK_WINDOW_S: Final = 1.0
NUM_REQUESTS: Final = 500
QUICK_REQUESTS: Final = 50
EXPORTED_S: Final = 2.0  # a span waits for a second for others to go with
# Without it, so that what tracing costs those who do not use it shows in the gateway's own figures.
LIMIT_PER_TOKEN: Final = 1.05
LIMIT_SAMPLED: Final = 1.05

Samples = dict[str, list[float]]  # variant -> one value per round


async def measure(model_dir: Path, *, quick: bool) -> Report:
    rounds = QUICK_ROUNDS if quick else ROUNDS
    window = QUICK_WINDOW_S if quick else WINDOW_S
    count = QUICK_REQUESTS if quick else NUM_REQUESTS
    report = Report(
        "tracing",
        {
            "rounds": f"{rounds}, interleaved; medians, and of ratios the median of the rounds'",
            "requests": f"{count} chats of {runs.PROMPT_TOKENS} tokens and more, {AT_ONCE} at once, one token each",
            "streams": f"{STREAMS} of about {runs.RATE:.0f} tokens a second, {window:.0f} s",
            "collector": "takes every batch at once, on the same machine",
        },
    )
    prompts = runs.texts(model_dir)
    per_request: Samples = {name: [] for name in RATIOS}
    per_token: Samples = {name: [] for name in RATIOS}
    async with AsyncExitStack() as stack:
        collector = await stack.enter_async_context(Helper.running("bench.span_counter"))
        gateways: dict[str, Server] = {}
        for name, ratio in RATIOS.items():
            with traced(collector.told["port"], ratio):
                gateways[name] = await stack.enter_async_context(servers.own(model_dir))
        for number in range(rounds):
            for name in (*list(RATIOS)[number % len(RATIOS) :], *list(RATIOS)[: number % len(RATIOS)]):
                per_request[name].append(await request_ms(gateways[name], count, prompts))
                run = await runs.paced(gateways[name], STREAMS, window, prompts, 0)
                per_token[name].append(run.cost.total / run.num_tokens * 1e6)
        await asyncio.sleep(EXPORTED_S)
        counted = await collector.do()
    num_traced = rounds * (count + WARM_UP + STREAMS)
    for name in ("1 %", "all"):
        limit = LIMIT_SAMPLED if name == "1 %" else None
        report.add(f"CPU per request: {name} ÷ off", ratio_of(per_request, name), "", limit)
        report.add(f"CPU per token: {name} ÷ off", ratio_of(per_token, name), "", LIMIT_PER_TOKEN)
    report.add("added by all: CPU per traced request", added_ms(per_request) * 1e3, "µs")
    for name in RATIOS:
        report.add(f"{name}: CPU per request", statistics.median(per_request[name]), "ms")
        report.add(f"{name}: CPU per token", statistics.median(per_token[name]), "µs")
    # The sampled gateway's few are among them.
    report.add("spans per traced request", counted["spans"] / (num_traced * (1 + 0.01)))
    report.add("bytes to the collector per span", counted["bytes"] / counted["spans"], "B")
    report.raw = {"per request, ms": per_request, "per token, µs": per_token, "counted": counted}
    return report


@contextmanager
def traced(port: int, ratio: float | None) -> Iterator[None]:
    """A gateway that is started meanwhile traces this share of its requests."""
    variables = {
        "KVFERRY_OTLP_ENDPOINT": f"http://127.0.0.1:{port}",
        "KVFERRY_TRACE_SAMPLE_RATIO": str(ratio),
    }
    if ratio is not None:
        os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


async def request_ms(server: Server, count: int, prompts: list[str]) -> float:
    """CPU milliseconds of one request, until its spans have left."""
    clients = await Clients.open(server.port, AT_ONCE, MODEL_NAME, prompts)
    try:
        await clients.one_after_the_other(WARM_UP, 1)
        await asyncio.sleep(EXPORTED_S)
        idle = Meter(server.gateway)
        await asyncio.sleep(EXPORTED_S)
        idle_s = idle.read().total
        meter = Meter(server.gateway)
        await clients.one_after_the_other(count, 1)
        await asyncio.sleep(EXPORTED_S)
        return (meter.read().total - idle_s) / count * 1e3
    finally:
        clients.close()


def ratio_of(samples: Samples, name: str) -> float:
    return statistics.median(traced / off for traced, off in zip(samples[name], samples["off"], strict=True))


def added_ms(samples: Samples) -> float:
    return statistics.median(traced - off for traced, off in zip(samples["all"], samples["off"], strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--quick", action="store_true", help="few samples: no figures to quote")
    arguments = parser.parse_args()
    setup_logging("warning", "auto", service="bench")
    report = uvloop.run(measure(arguments.model, quick=arguments.quick))
    if arguments.quick:
        print(report.render())
        return 0
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
