"""The two ends of a hand-off between workers of several ranks: those of `bench.handoff_ends`, on the native engine.

python -m bench.ranks_ends MODEL_DIR TRANSPORT NUM_TOKENS ROUNDS RANKS     the prefill process; prints its address
"""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import uvloop

from bench.handoff_ends import IdleNativeRunner, num_blocks, pull, serve_prefill
from kvferry.config.layers import load_settings
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.runtime import SystemRuntime
from kvferry.worker.ranks import ranks_of
from kvferry_decode.settings import DecodeSettings


@contextmanager
def ranked(settings: EngineSettings, size: int, runner: type[NativeRunner] = NativeRunner) -> Iterator[NativeRunner]:
    """On ranks that are started as a worker starts them."""
    flags = {"name": "bench", "model": str(settings.model_dir), "tensor_parallel_size": size}
    worker = load_settings(DecodeSettings, config_file=None, environ={}, flags=flags)
    with ranks_of(worker, SystemRuntime()) as ranks:
        made = runner(replace(settings, tensor_parallel_size=size), followers=ranks.joined())
        yield made
        made.close()


def idle_settings(model_dir: Path, num_tokens: int) -> EngineSettings:
    return EngineSettings(model_dir, num_blocks=num_blocks(num_tokens), threads=1)


async def hand_offs(
    model_dir: Path, transport: str, num_tokens: int, rounds: int, ranks: tuple[int, int]
) -> list[float]:
    """Seconds of each, between a prefill and a decode worker of so many ranks."""
    arguments = (str(model_dir), transport, str(num_tokens), str(rounds), str(ranks[0]))
    program = ("-m", "bench.ranks_ends", *arguments)
    prefill = await asyncio.create_subprocess_exec(sys.executable, *program, stdin=DEVNULL, stdout=PIPE)
    assert prefill.stdout is not None
    address = (await prefill.stdout.readline()).decode().strip()
    with ranked(idle_settings(model_dir, num_tokens), ranks[1], IdleNativeRunner) as runner:
        seconds = await pull(runner, transport, num_tokens, rounds, address)
    await prefill.wait()
    return seconds


def main() -> None:
    model, transport, num_tokens, rounds, ranks = sys.argv[1:]
    with ranked(idle_settings(Path(model), int(num_tokens)), int(ranks), IdleNativeRunner) as runner:
        uvloop.run(serve_prefill(runner, transport, int(num_tokens), int(rounds)))


if __name__ == "__main__":
    main()
