"""The data plane alone, at the frame size, between two processes on loopback.

UCX against `ucx_perftest` with the same options (UCX's own limit: it spins on both cores), TCP against a bare
loop of `sock_sendall` and `sock_recv_into`. The rivals run in turn within each round, so that a slow minute
hits them all; a ratio is the median over rounds of each round's ratio.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import statistics
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import uvloop

from bench.options import Options
from bench.report import Report
from bench.transport_ends import FRAME_BYTES, WINDOW, send_over_socket, send_over_transport
from kvferry.transport.ucx import context_options

ROUNDS: Final = 7
QUICK_ROUNDS: Final = 2
FRAMES: Final = 250  # of each run: 1 GiB
START_S: Final = 30.0
MIB: Final = 1 << 20
UCX_LIMIT: Final = 0.8
TCP_LIMIT: Final = 0.9

Run = Callable[[], Awaitable[float]]  # bytes per second


async def measure(options: Options) -> Report:
    return await measure_rounds(QUICK_ROUNDS if options.quick else ROUNDS)


async def measure_rounds(rounds: int) -> Report:
    runs: dict[str, Run] = {
        "ucx": lambda: _kvferry("ucx"),
        "ucx_perftest tag_bw": lambda: _perftest("tag_bw"),
        "ucx_perftest ucp_am_bw": lambda: _perftest("ucp_am_bw"),
        "tcp": lambda: _kvferry("tcp"),
        "bare sockets": _sockets,
    }
    samples: dict[str, list[float]] = {name: [] for name in runs}
    report = Report(
        "transport",
        {
            "frames": f"{FRAMES} of {FRAME_BYTES:,} bytes, window {WINDOW}, {rounds} interleaved rounds, medians",
            "processes": "2, on loopback, not pinned; uvloop",
            "ucx_perftest": " ".join(_perftest_command("tag_bw|ucp_am_bw", "PORT")),
            "its options": " ".join(f"{name}={value}" for name, value in _ucx_environment().items()),
        },
        raw=dict(samples),
    )
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(await run())
    for name, values in samples.items():
        report.add(name, statistics.median(values) / 1e9, "GB/s")
    for ours, theirs, limit in (
        ("ucx", "ucx_perftest tag_bw", UCX_LIMIT),
        ("ucx", "ucx_perftest ucp_am_bw", UCX_LIMIT),
        ("tcp", "bare sockets", TCP_LIMIT),
    ):
        ratios = [mine / rival for mine, rival in zip(samples[ours], samples[theirs], strict=True)]
        report.add(f"{ours} ÷ {theirs}", statistics.median(ratios), "", limit, at_least=True)
    return report


@asynccontextmanager
async def _receiver(kind: str) -> AsyncIterator[str]:
    """The other process; yields its address."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.transport_ends", kind, str(FRAMES), stdout=PIPE
    )
    assert process.stdout is not None
    try:
        yield (await asyncio.wait_for(process.stdout.readline(), START_S)).decode().strip()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _kvferry(kind: str) -> float:
    async with _receiver(kind) as address:
        return await send_over_transport(kind, address, FRAMES)


async def _sockets() -> float:
    async with _receiver("sockets") as port:
        return await send_over_socket(int(port), FRAMES)


def _ucx_home() -> Path:
    """Where the wheel of UCX lies, found without loading it."""
    spec = importlib.util.find_spec("libucx")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("ucx_perftest comes with kvferry[ucx]")
    return Path(spec.origin).parent


def _ucx_environment() -> dict[str, str]:
    options = {f"UCX_{name}": value for name, value in context_options("lo").items()}
    return options | {"UCX_WARN_UNUSED_ENV_VARS": "n"}


def _perftest_command(test: str, port: str) -> list[str]:
    return [
        "ucx_perftest", "127.0.0.1", "-p", port, "-t", test, "-e", "-s", str(FRAME_BYTES),
        "-n", str(FRAMES), "-w", "20", "-O", str(WINDOW),
    ]  # fmt: skip


async def _perftest(test: str) -> float:
    home = _ucx_home()
    environment = os.environ | _ucx_environment() | {"LD_LIBRARY_PATH": str(home / "lib")}
    program = str(home / "bin" / "ucx_perftest")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    server = await asyncio.create_subprocess_exec(program, "-p", port, env=environment, stdout=DEVNULL, stderr=DEVNULL)
    try:
        await _listens(int(port))
        client = await asyncio.create_subprocess_exec(
            program, *_perftest_command(test, port)[1:], env=environment, stdout=PIPE, stderr=DEVNULL
        )
        output, _ = await asyncio.wait_for(client.communicate(), START_S)
        await asyncio.wait_for(server.wait(), START_S)
    finally:
        if server.returncode is None:
            server.kill()
            await server.wait()
    final = next(line.split() for line in output.decode().splitlines() if line.startswith("Final:"))
    return float(final[-3]) * MIB  # columns: iterations, 3 latencies, bandwidth of late and overall, 2 rates


async def _listens(port: int) -> None:
    """Wait for a listener without connecting to it: the server takes its first peer for the client."""
    async with asyncio.timeout(START_S):
        while not _is_listening(port):  # noqa: ASYNC110 - the kernel tells nobody
            await asyncio.sleep(0.01)


def _is_listening(port: int) -> bool:
    wanted = f":{port:04X} "
    return any(wanted in line and " 0A " in line for line in Path("/proc/net/tcp").read_text().splitlines())


if __name__ == "__main__":
    result = uvloop.run(measure_rounds(int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS))
    print(result.render())
    if len(sys.argv) == 1:  # fewer rounds are a smoke test
        print(f"   written to {os.path.relpath(result.write())}")
    sys.exit(not result.holds)
