"""The gateway's own cost, before workers that compute nothing: CPU per streamed token and per request, and how much
later a token reaches its client.

kvferry's gateway, Dynamo's frontend where PEERS has it, and the bare write loop run in turn within each round, at the
same pace and with the same clients. Every request has stop strings and asks for its usage; metrics are on, tracing is
off. CPU is user and system time of the gateway's process alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import uvloop

from bench import gateway_runs as runs
from bench import gateway_servers as servers
from bench import rivals
from bench.gateway_fleet import BURST
from bench.gateway_servers import DYNAMO, FLOOR, OWN, Server
from bench.report import Report, percentile
from kvferry.log import setup_logging

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
WINDOW_S: Final = 6.0
QUICK_WINDOW_S: Final = 1.0
STREAMS: Final = (1, 32, 256)
NUM_REQUESTS: Final = 400
NUM_ALONE: Final = 100
QUICK_SHARE: Final = 10
OF_DYNAMO: Final = 0.4  # per token
OF_FLOOR: Final = 1.5
FLAT_OUT: Final = 1e6  # tokens per core-second
ADDED_MS: Final = 1.5  # batch to client at 32 streams, p99
ALONE_MS: Final = 3.0
EVENTS: Final = 0.98

Samples = dict[str, list[float]]  # figure -> one value per round


async def measure(model_dir: Path, peers: Path | None, *, quick: bool) -> Report:
    """`peers`: where Dynamo has been built; None: nowhere."""
    rounds = QUICK_ROUNDS if quick else ROUNDS
    window = QUICK_WINDOW_S if quick else WINDOW_S
    report = Report(
        "gateway",
        {
            "rounds": f"{rounds}, interleaved; medians, and of ratios the median of the rounds'",
            "requests": f"chats of {runs.PROMPT_TOKENS} tokens and more, four stop strings, usage, on kept connections",
            "pace": f"about {runs.RATE:.0f} tokens a second of each stream, one batch for all; {window:.0f} s each",
            "flat out": f"{runs.FLAT_STREAMS} streams of {runs.FLAT_TOKENS} tokens, {BURST} batches at once",
            "Dynamo": "not built" if peers is None else "1.6.1, mock workers, its TCP request plane",
            "logs": "warnings only, in both",
        },
    )
    bench = _Bench(model_dir, peers, window, QUICK_SHARE if quick else 1)
    for _ in range(rounds):
        await bench.round()
    bench.tell(report)
    return report


class _Bench:
    def __init__(self, model_dir: Path, peers: Path | None, window: float, share: int) -> None:
        self._model_dir = model_dir
        self._peers = peers
        self._window = window
        self._share = share  # one request in so many
        self._prompts = runs.texts(model_dir)
        self._event_bytes = 0
        self._samples: Samples = {}
        self._costs: dict[str, list[tuple[float, float, float]]] = {}  # total, user, system of each run

    async def round(self) -> None:
        """Every server at every number of streams; kvferry first, for the write loop writes as many bytes."""
        async with servers.own(self._model_dir) as server:
            for streams in STREAMS:
                await self._paced(server, streams)
                async with servers.floor() as floor:
                    await self._paced(floor, streams)
                if self._peers is not None:
                    async with servers.dynamo(self._peers, servers.DYNAMO_SPEED[streams]) as dynamo:
                        await self._paced(dynamo, streams)
            cost = await runs.flat_out(server, self._prompts)
            self._add(f"{OWN}: flat out", runs.FLAT_STREAMS * runs.FLAT_TOKENS / cost.total)
            self._note(f"{OWN}: flat out", cost)
            await self._requests(server)
        if self._peers is not None:
            async with servers.dynamo(self._peers, 0) as dynamo:
                await self._requests(dynamo)

    async def _paced(self, server: Server, streams: int) -> None:
        run = await runs.paced(server, streams, self._window, self._prompts, self._event_bytes)
        what = f"{server.name}: CPU per token, {streams} streams"
        self._add(what, run.cost.total / run.num_tokens * 1e6)
        self._note(what, run.cost)
        self._add(f"{server.name}: tokens a second of a stream, {streams} streams", run.rate)
        if server.name == OWN:
            self._event_bytes = round(run.event_bytes)
            assert run.bus is not None
            self._add(f"nats-server: CPU per token, {streams} streams", run.bus.total / run.num_tokens * 1e6)
            self._add(f"{OWN}: added latency, {streams} streams, p50", percentile(run.added_ms, 0.5))
            self._add(f"{OWN}: added latency, {streams} streams, p99", percentile(run.added_ms, 0.99))
        if server.name != FLOOR:
            self._add(f"{server.name}: events ÷ tokens, {streams} streams", run.events_per_token)

    async def _requests(self, server: Server) -> None:
        count = NUM_REQUESTS // self._share
        cost = await runs.requests(server, count, self._prompts)
        self._add(f"{server.name}: CPU per request", cost.total / count * 1e3)
        self._note(f"{server.name}: CPU per request", cost)
        self._add(
            f"{server.name}: one request at a time, end to end",
            await runs.added_to_one(server, NUM_ALONE // self._share, self._prompts),
        )

    def _add(self, figure: str, value: float) -> None:
        self._samples.setdefault(figure, []).append(value)

    def _note(self, figure: str, cost: runs.Cost) -> None:
        self._costs.setdefault(figure, []).append((cost.total, cost.user, cost.system))

    def tell(self, report: Report) -> None:
        """Ratios first: they are what is promised."""
        for streams in STREAMS:
            what = f"CPU per token, {streams} streams"
            promised = streams > 1
            self._ratio(report, f"{OWN}: {what}", f"{DYNAMO}: {what}", OF_DYNAMO if promised else None)
            self._ratio(report, f"{OWN}: {what}", f"{FLOOR}: {what}", OF_FLOOR if promised else None)
        self._ratio(report, f"{OWN}: CPU per request", f"{DYNAMO}: CPU per request", 1.0)
        self._median(report, f"{OWN}: flat out", "tok/s", FLAT_OUT, at_least=True)
        self._median(report, f"{OWN}: added latency, 32 streams, p99", "ms", ADDED_MS)
        self._median(report, f"{OWN}: one request at a time, end to end", "ms", ALONE_MS)
        for streams in STREAMS:
            self._median(report, f"{OWN}: events ÷ tokens, {streams} streams", "", EVENTS, at_least=True)
        told = {figure.name for figure in report.figures}
        for figure in self._samples:
            if figure not in told:
                self._median(report, figure, _unit(figure))
        for figure, costs in self._costs.items():
            user, system = (sum(cost[part] for cost in costs) for part in (1, 2))
            report.add(f"{figure}: system ÷ all", system / (user + system) if user + system else 0.0)
        report.raw = {"samples": self._samples, "seconds of total, user, system": self._costs}

    def _ratio(self, report: Report, one: str, other: str, limit: float | None) -> None:
        if one in self._samples and other in self._samples:
            ratios = [a / b for a, b in zip(self._samples[one], self._samples[other], strict=True)]
            whose, _, what = other.partition(": ")
            report.add(f"{what}: {OWN} ÷ {whose}", statistics.median(ratios), "", limit)

    def _median(
        self, report: Report, figure: str, unit: str, limit: float | None = None, *, at_least: bool = False
    ) -> None:
        if figure in self._samples:
            report.add(figure, statistics.median(self._samples[figure]), unit, limit, at_least)


def _unit(figure: str) -> str:
    units: Sequence[tuple[Callable[[str], Any], str]] = (
        (lambda name: "CPU per token" in name, "µs"),
        (lambda name: "CPU per request" in name or "latency" in name or "end to end" in name, "ms"),
        (lambda name: "tokens a second" in name, "tok/s"),
    )
    return next((unit for holds, unit in units if holds(figure)), "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="Hugging Face model directory")
    parser.add_argument("--quick", action="store_true", help="few samples: no figures to quote")
    arguments = parser.parse_args()
    setup_logging("warning", "auto", service="bench")
    folder = Path(os.environ.get("PEERS", ""))
    peers = folder if "PEERS" in os.environ and rivals.available(folder, "dynamo") else None
    report = uvloop.run(measure(arguments.model, peers, quick=arguments.quick))
    if arguments.quick:
        print(report.render())
        return 0
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main())
