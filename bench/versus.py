"""kvferry beside llama.cpp and vLLM: the same machine, model, prompts and client, in interleaved rounds.

Needs PEERS: a folder where both have been built. Every figure is the median of several rounds; a round visits
the servers of a group one after the other, and the rivals that are not visited are frozen. Prefill counts prompt tokens
over the whole time of a request (of 1 token; of 2 where prefill and decode are apart, for the second is the
first that waits for the KV). Decode counts tokens while all streams run.
"""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from bench import rivals
from bench.contenders import Server, as_server, decode_rate, frozen
from bench.interference import judged_by_peers
from bench.machine import read_bandwidth
from bench.options import Options
from bench.prompts import Prompts
from bench.report import Report
from bench.stack import running
from kvferry.engine.native.library import open_library

ROUNDS: Final = 5
QUICK_ROUNDS: Final = 1
BURSTS: Final = 10
QUICK_BURSTS: Final = 3
DECODE_PROMPT: Final = 64
DECODE_TOKENS: Final = 96
WARM_UP_PROMPT: Final = 300

Samples = dict[str, list[float]]  # what was measured -> one value per round


async def measure(options: Options) -> Report:
    peers = options.peers
    if peers is None or not (rivals.available(peers, "llama") and rivals.available(peers, "vllm")):
        raise RuntimeError("PEERS names no folder where llama.cpp and vLLM have been built")
    report = Report("versus", {"cores": "0 and 1", "model": "SmolLM2-135M, BF16 unless said", "client": "one for all"})
    bench = _Bench(options, peers, report)
    await bench.single()
    await bench.quantized()
    await bench.apart()
    await bench.interference()
    return report


class _Bench:
    def __init__(self, options: Options, peers: Path, report: Report) -> None:
        self._options = options
        self._peers = peers
        self._report = report
        self._prompts = Prompts(options.model_dir, seed=5)
        self._rounds = QUICK_ROUNDS if options.quick else ROUNDS

    async def single(self) -> None:
        """One worker on two cores."""
        async with AsyncExitStack() as stack:
            own = await stack.enter_async_context(self._kvferry("--threads", "2", "--prefill", "0"))
            llama = await stack.enter_async_context(rivals.llama(self._peers, "BF16"))
            vllm = await stack.enter_async_context(rivals.vllm(self._peers))
            found = await self._compare(
                [own, as_server("llama.cpp", llama), as_server("vLLM", vllm)], prefill=(512, 2048), decode=(1, 8)
            )
        name = "single worker, 2 cores"
        for length in (512, 2048):
            self._add(f"{name}: prefill {length} ÷ vLLM", found, f"prefill {length}", "vLLM", 1.25)
        self._add(f"{name}: decode 1 stream ÷ llama.cpp", found, "decode 1", "llama.cpp", 1.3)
        best = max(("llama.cpp", "vLLM"), key=lambda rival: statistics.median(found[rival]["decode 8"]))
        self._add(f"{name}: decode 8 streams ÷ the better ({best})", found, "decode 8", best, 2.5)
        self._report.raw[name] = found
        self._tell_bound(found, "BF16")

    async def quantized(self) -> None:
        async with AsyncExitStack() as stack:
            flags = ("--threads", "2", "--prefill", "0", "--quantization", "int8")
            own = await stack.enter_async_context(self._kvferry(*flags))
            llama = await stack.enter_async_context(rivals.llama(self._peers, "Q8_0"))
            found = await self._compare([own, as_server("llama.cpp", llama)], prefill=(), decode=(1,))
        self._add("int8, 2 cores: decode 1 stream ÷ llama.cpp Q8_0", found, "decode 1", "llama.cpp", 2.0)
        self._report.raw["int8"] = found
        self._tell_bound(found, "Q8_0")

    async def apart(self) -> None:
        """Prefill on one core, decode on the other."""
        async with AsyncExitStack() as stack:
            own = await stack.enter_async_context(self._kvferry_apart())
            vllm = await stack.enter_async_context(rivals.vllm_apart(self._peers))
            found = await self._compare([own, as_server("vLLM P/D", vllm, 2)], prefill=(2048,), decode=(8,))
        self._add("1 + 1 cores: prefill 2048 ÷ vLLM P/D", found, "prefill 2048", "vLLM P/D", 1.4)
        self._add("1 + 1 cores: decode 8 streams ÷ vLLM P/D", found, "decode 8", "vLLM P/D", 2.3)
        self._report.raw["apart"] = found

    async def interference(self) -> None:
        """The worst gap of running streams per arriving long prompt."""
        bursts = QUICK_BURSTS if self._options.quick else BURSTS
        async with self._kvferry_apart() as own:
            gaps = (await judged_by_peers(self._peers, own.port, bursts, core=0)).stalls
        async with rivals.vllm(self._peers, rivals.SMALL_CHUNKS) as vllm:
            theirs = (await judged_by_peers(self._peers, vllm.port, bursts, core=None)).stalls
        median, rival = statistics.median(gaps), statistics.median(theirs)
        self._report.add("1 + 1 cores: worst gap per arrival", median, "ms")
        self._report.add("vLLM, 256-token chunks, 2 cores: worst gap per arrival", rival, "ms")
        self._report.add("worst gap per arrival ÷ vLLM's", median / rival, "", 0.15)
        self._report.raw["gaps, ms"] = {"kvferry": gaps, "vLLM": theirs}

    @asynccontextmanager
    async def _kvferry(self, *flags: str) -> AsyncIterator[Server]:
        async with running(self._options, *flags) as stack:
            yield Server("kvferry", stack.port)

    @asynccontextmanager
    async def _kvferry_apart(self) -> AsyncIterator[Server]:
        settings = {"local_prefill_threshold": "0"}
        async with running(self._options, "--threads", "1", settings=settings) as stack:
            await stack.pin({"prefill": [0], "decode": [1], "": [0]})
            yield Server("kvferry", stack.port, 2)

    async def _compare(
        self, servers: list[Server], prefill: tuple[int, ...], decode: tuple[int, ...]
    ) -> dict[str, Samples]:
        found: dict[str, Samples] = {server.name: {} for server in servers}
        for number in range(-1, self._rounds):
            for server in servers:
                with frozen(servers, but=server):
                    values = await self._visit(server, prefill, decode)
                if number >= 0:  # the first visit warms up
                    for what, value in values.items():
                        found[server.name].setdefault(what, []).append(round(value, 1))
        return found

    async def _visit(self, server: Server, prefill: tuple[int, ...], decode: tuple[int, ...]) -> dict[str, float]:
        values = {}
        for length in prefill:
            answer = await server.complete(self._prompts.tokens(length), server.prefill_tokens)
            values[f"prefill {length}"] = length / (answer.ended - answer.sent)
        for count in decode:
            prompts = [self._prompts.tokens(DECODE_PROMPT) for _ in range(count)]
            streams = await asyncio.gather(*(server.complete(prompt, DECODE_TOKENS) for prompt in prompts))
            values[f"decode {count}"] = decode_rate(streams)
        return values

    def _tell_bound(self, found: dict[str, Samples], quantization: str) -> None:
        """How much faster than llama.cpp any server can be that reads as many bytes a token."""
        read = statistics.median(found["llama.cpp"]["decode 1"]) * rivals.weight_bytes(self._peers, quantization)
        share = read / read_bandwidth(open_library(), 2)
        self._report.add(f"llama.cpp {quantization}: weights read ÷ what both cores can read", share, "")

    def _add(self, name: str, found: dict[str, Samples], what: str, rival: str, limit: float) -> None:
        own, theirs = (statistics.median(found[server][what]) for server in ("kvferry", rival))
        self._report.add(f"{name}", own / theirs, "", limit, at_least=True)
        self._report.raw.setdefault("tok/s", {})[name] = {"kvferry": own, rival: theirs}
