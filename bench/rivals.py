"""Other servers on the same machine and model, started by launch scripts that lie under `$PEERS/bin`.

Each is an OpenAI-compatible server on a port of 127.0.0.1 that answers `/v1/completions` with token-id prompts.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.client import RequestError, request_bytes
from bench.stack import HOST, ROOT
from kvferry.runtime import blocking_clock

START_TIMEOUT_S: Final = 400.0  # a compiled vLLM warms up for minutes
STOP_TIMEOUT_S: Final = 60.0
LLAMA_PORT: Final = 8300
VLLM_PORT: Final = 8500
VLLM_PD_PORT: Final = 8503
SMALL_CHUNKS: Final = " --max-num-batched-tokens 256"
COMPILED: Final = " "  # in place of the launch script's --enforce-eager


class RivalError(Exception):
    """A peer did not start; the message names its script."""


@dataclass(frozen=True, slots=True)
class Rival:
    """A server that is ready."""

    name: str
    port: int


def available(peers: Path, name: str) -> bool:
    """Whether a peer has been built there."""
    built = {"llama": peers / "build-llama/bin/llama-server", "vllm": peers / "venv-vllm/bin/vllm"}
    return built[name].is_file()


@asynccontextmanager
async def llama(peers: Path, quantization: str, threads: int = 2, slots: int = 8) -> AsyncIterator[Rival]:
    """llama.cpp's server; `quantization` as in the file's name, BF16 or Q8_0."""
    model = peers / f"models/smollm2-{quantization}.gguf"
    async with _launched(
        peers, "llama-server.sh", ("start", str(threads), str(slots), str(model), str(LLAMA_PORT)), ("stop",)
    ):
        await _wait(LLAMA_PORT, "/health", "llama-server.sh")
        yield Rival(f"llama.cpp {quantization}", LLAMA_PORT)


@asynccontextmanager
async def vllm(peers: Path, flags: str = COMPILED) -> AsyncIterator[Rival]:
    """vLLM on cores 0 and 1."""
    place = (str(VLLM_PORT), "0-1", "vllm")
    async with _launched(peers, "vllm-serve.sh", ("start", *place), ("stop", *place), {"VARGS": flags}):
        await _wait(VLLM_PORT, "/health", "vllm-serve.sh")
        yield Rival("vLLM", VLLM_PORT)


@asynccontextmanager
async def vllm_apart(peers: Path) -> AsyncIterator[Rival]:
    """vLLM's prefill on core 0 and its decode on core 1, KV by NIXL. It spins on both even when idle: let nothing
    else be measured beside it."""
    async with _launched(peers, "vllm-pd.sh", ("start",), ("stop",), {"VARGS": COMPILED}):
        await _wait(VLLM_PD_PORT, "/v1/models", "vllm-pd.sh")
        yield Rival("vLLM P/D", VLLM_PD_PORT)


@asynccontextmanager
async def frozen(peers: Path) -> AsyncIterator[None]:
    """Stop the processes of `vllm_apart` for the block."""
    await _run(peers, "pdsig.sh", ("STOP",), {}, STOP_TIMEOUT_S)
    try:
        yield
    finally:
        await _run(peers, "pdsig.sh", ("CONT",), {}, STOP_TIMEOUT_S)


@asynccontextmanager
async def _launched(
    peers: Path, script: str, start: tuple[str, ...], stop: tuple[str, ...], settings: Mapping[str, str] | None = None
) -> AsyncIterator[None]:
    try:
        await _run(peers, script, start, settings or {}, START_TIMEOUT_S)
        yield
    finally:
        await _run(peers, script, stop, {}, STOP_TIMEOUT_S)


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


async def _wait(port: int, path: str, script: str) -> None:
    deadline = blocking_clock() + START_TIMEOUT_S
    while blocking_clock() < deadline:
        try:
            await request_bytes(HOST, port, path)
        except (OSError, RequestError, asyncio.IncompleteReadError):
            await asyncio.sleep(0.5)
        else:
            return
    raise RivalError(f"{script}: no answer on port {port} after {START_TIMEOUT_S:.0f} s")
