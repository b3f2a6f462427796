"""Other servers on the same machine and model, started by launch scripts that lie under `$PEERS/bin`.

Each is an OpenAI-compatible server on a port of 127.0.0.1 that answers `/v1/completions` with token-id prompts. Some
keep cores busy when idle: whoever measures anything else beside them freezes them for that time.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.processes import PROC, descendants
from bench.stack import HOST, ROOT
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, ServerError

START_TIMEOUT_S: Final = 400.0  # a compiled vLLM warms up for minutes
STOP_TIMEOUT_S: Final = 60.0
LLAMA_PORT: Final = 8300
VLLM_PORT: Final = 8500
VLLM_PD_PORT: Final = 8503
DYNAMO_PORT: Final = 8400
SMALL_CHUNKS: Final = " --max-num-batched-tokens 256"
COMPILED: Final = " "  # in place of the launch script's --enforce-eager
_MARK: Final = "BENCH_RIVAL"  # in the environment of all processes of one


class RivalError(Exception):
    """A peer did not start; the message names its script."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A server that is ready."""

    name: str
    port: int

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop its processes for the block."""
        pids = _processes(self.name)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)


def available(peers: Path, name: str) -> bool:
    """Whether a peer has been built there."""
    built = {
        "llama": peers / "build-llama/bin/llama-server",
        "vllm": peers / "venv-vllm/bin/vllm",
        "dynamo": peers / "venv-dyn/bin/python",
    }
    return built[name].is_file()


def weight_bytes(peers: Path, quantization: str) -> int:
    """Of llama.cpp's model: what it reads for each token of a lone stream."""
    return _gguf(peers, quantization).stat().st_size


def _gguf(peers: Path, quantization: str) -> Path:
    return peers / f"models/smollm2-{quantization}.gguf"


@asynccontextmanager
async def llama(peers: Path, quantization: str, threads: int = 2, slots: int = 8) -> AsyncIterator[Rival]:
    """llama.cpp's server; `quantization` as in the file's name, BF16 or Q8_0."""
    model = _gguf(peers, quantization)
    rival = Rival(f"llama.cpp {quantization}", LLAMA_PORT)
    start = ("start", str(threads), str(slots), str(model), str(LLAMA_PORT))
    async with _launched(rival, peers, "llama-server.sh", start, ("stop",)):
        await wait_ready(LLAMA_PORT, "/health", "llama-server.sh")
        yield rival


@asynccontextmanager
async def vllm(peers: Path, flags: str = COMPILED) -> AsyncIterator[Rival]:
    """vLLM on cores 0 and 1."""
    rival, place = Rival("vLLM", VLLM_PORT), (str(VLLM_PORT), "0-1", "vllm")
    async with _launched(rival, peers, "vllm-serve.sh", ("start", *place), ("stop", *place), {"VARGS": flags}):
        await wait_ready(VLLM_PORT, "/health", "vllm-serve.sh")
        yield rival


@asynccontextmanager
async def vllm_apart(peers: Path) -> AsyncIterator[Rival]:
    """vLLM's prefill on core 0 and its decode on core 1, KV by NIXL."""
    rival = Rival("vLLM P/D", VLLM_PD_PORT)
    async with _launched(rival, peers, "vllm-pd.sh", ("start",), ("stop",), {"VARGS": COMPILED}):
        await wait_ready(VLLM_PD_PORT, "/v1/models", "vllm-pd.sh")
        yield rival


@asynccontextmanager
async def dynamo(peers: Path, speed: float) -> AsyncIterator[tuple[Rival, int]]:
    """Dynamo's frontend, and its process id, with a mock prefill and a mock decode worker of a GPU's pace times
    `speed`; 0: they take no time."""
    rival, start = Rival("Dynamo", DYNAMO_PORT), ("start", "tcp", f"{speed:g}", "disagg", str(DYNAMO_PORT))
    async with _launched(rival, peers, "dynamo-disagg.sh", start, ("stop",)):
        await wait_ready(DYNAMO_PORT, "/v1/models", "dynamo-disagg.sh")
        yield rival, int((peers / "run/dynamo/frontend.pid").read_text())


@asynccontextmanager
async def _launched(
    rival: Rival,
    peers: Path,
    script: str,
    start: tuple[str, ...],
    stop: tuple[str, ...],
    settings: Mapping[str, str] | None = None,
) -> AsyncIterator[None]:
    try:
        await _run(peers, script, start, {_MARK: rival.name, **(settings or {})}, START_TIMEOUT_S)
        yield
    finally:
        await _run(peers, script, stop, {}, STOP_TIMEOUT_S)


def _processes(name: str) -> list[int]:
    """Those with the mark, and all below them: one that renames itself, as vLLM's workers do, writes over it."""
    mark, found = f"{_MARK}={name}".encode(), dict[int, None]()
    for folder in PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or is somebody else's
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found |= dict.fromkeys((int(folder.name), *descendants(int(folder.name))))
    return list(found)


async def _run(
    peers: Path, script: str, arguments: tuple[str, ...], settings: Mapping[str, str], timeout: float
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "KVFERRY_"))}
    process = await asyncio.create_subprocess_exec(
        str(peers / "bin" / script),
        *arguments,
        cwd=ROOT,
        env={**environment, "PEERS": str(peers), **settings},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    async with asyncio.timeout(timeout):
        await process.wait()


async def wait_ready(port: int, path: str, script: str) -> None:
    deadline = blocking_clock() + START_TIMEOUT_S
    while blocking_clock() < deadline:
        try:
            await Endpoint(HOST, port).get(path)
        except (OSError, ServerError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.5)
        else:
            return
    raise RivalError(f"{script}: no answer on port {port} after {START_TIMEOUT_S:.0f} s")
