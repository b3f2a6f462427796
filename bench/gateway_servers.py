"""What is measured by the same clients: kvferry's gateway before workers that compute nothing, Dynamo's frontend before
its own mock workers, and the bare write loop."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bench import gateway_fleet, rivals
from bench.options import MODEL_NAME
from bench.processes import Process
from kvferry.bus.rights import BUS_ROLES, user_name, users_of
from kvferry.bus.server import EmbeddedNats
from kvferry_local.process import Process as Service
from kvferry_local.process import Program

FLOOR: Final = "write loop"
OWN: Final = "kvferry"
DYNAMO: Final = "Dynamo"
CLUSTER: Final = "bench"
START_S: Final = 60.0
MAX_LINE_BYTES: Final = 1 << 22
# Of the mock workers' own pace, so that each stream gets about 50 tokens a second.
DYNAMO_SPEED: Final = {1: 0.29, 32: 0.42, 256: 1.25}


@dataclass(slots=True)
class Helper:
    """A program of ours that is told what to do line by line."""

    process: asyncio.subprocess.Process
    told: dict[str, Any] = field(default_factory=dict)  # its first line

    async def do(self, **command: float) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        return await self._line()

    async def _line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        if not line:
            raise RuntimeError("a helper of the benchmark has ended; its output says why")
        answer: dict[str, Any] = json.loads(line)
        return answer

    @classmethod
    @asynccontextmanager
    async def running(cls, *arguments: str, environ: Mapping[str, str] | None = None) -> AsyncIterator[Helper]:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", *arguments,
            stdin=PIPE, stdout=PIPE, env={**os.environ, **(environ or {})}, limit=MAX_LINE_BYTES,
        )  # fmt: skip
        helper = cls(process)
        try:
            async with asyncio.timeout(START_S):
                helper.told = await helper._line()
            yield helper
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()


@dataclass(frozen=True, slots=True)
class Server:
    """One that is ready. `gateway` is the process whose cost counts."""

    name: str
    port: int
    gateway: Process
    beside: Process | None = None  # the bus server that only we have
    helper: Helper | None = None  # what makes its tokens come; None: they come by themselves

    async def ready(self) -> None:
        """Wait until it would serve: on a busy machine its workers may have been silent for a while."""
        if self.beside is not None:
            await rivals.wait_ready(self.port, "/ready", "the gateway")

    @property
    def tells_usage(self) -> bool:
        return self.name != FLOOR

    async def run(self, rate: float, streams: int, num_tokens: int, event_bytes: int) -> Sequence[float]:
        """Give each of the streams, which have begun, the rest of its tokens, so many a second. Returns when each index
        was said, of `blocking_clock`; nothing where nobody knows."""
        if self.helper is None:
            return ()
        if self.name == FLOOR:
            await self.helper.do(rate=rate, writes=num_tokens, bytes=event_bytes)
            return ()
        published: list[float] = (await self.helper.do(rate=rate, streams=streams))["published"]
        return published


@asynccontextmanager
async def own(model_dir: Path) -> AsyncIterator[Server]:
    """kvferry's gateway, a NATS server and workers that compute nothing, each a process of its own."""
    password = secrets.token_hex(16)
    nats = EmbeddedNats(users_of(CLUSTER, dict.fromkeys(BUS_ROLES, password)))
    async with AsyncExitStack() as stack:
        await nats.start()
        stack.push_async_callback(nats.stop)
        bus = {gateway_fleet.URL_VARIABLE: nats.url, gateway_fleet.PASSWORD_VARIABLE: password}
        helper = await stack.enter_async_context(
            Helper.running("bench.gateway_fleet", CLUSTER, MODEL_NAME, str(model_dir), environ=bus)
        )
        gateway, port = await stack.enter_async_context(_gateway(model_dir, bus))
        yield Server(OWN, port, Process("gateway", gateway), Process("nats-server", nats.pid), helper)


@asynccontextmanager
async def _gateway(model_dir: Path, bus: Mapping[str, str]) -> AsyncIterator[tuple[int, int]]:
    """(process id, port) of one that sees both workers."""
    flags = ("--cluster", CLUSTER, "--port", "0", "--model", f"{MODEL_NAME}={model_dir}")
    command = (
        sys.executable,
        "-m",
        "kvferry_gateway",
        *flags,
        "--local-prefill-threshold",
        "0",
        "--log-level",
        "warning",
    )
    environ = {**bus, "KVFERRY_NATS_USER": user_name(CLUSTER, "gateway")}
    service = await Service.start(Program("gateway", "gateway", command, environ))
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def on_report(report: dict[str, Any]) -> None:
        if report["event"] == "ready" and not port.done():
            port.set_result(report["port"])

    following = asyncio.ensure_future(service.follow(on_report, lambda line: None))
    try:
        async with asyncio.timeout(START_S):
            await asyncio.wait((port, following), return_when=asyncio.FIRST_COMPLETED)
        if not port.done():
            raise RuntimeError("the gateway did not start:\n" + "\n".join(service.last_lines))
        await rivals.wait_ready(port.result(), "/ready", "the gateway")
        yield service.pid, port.result()
    finally:
        service.send(signal.SIGTERM)
        await following


@asynccontextmanager
async def floor() -> AsyncIterator[Server]:
    """The write loop."""
    async with Helper.running("bench.gateway_floor") as helper:
        yield Server(FLOOR, helper.told["port"], Process("write loop", helper.process.pid), helper=helper)


@asynccontextmanager
async def dynamo(peers: Path, speed: float) -> AsyncIterator[Server]:
    async with rivals.dynamo(peers, speed) as (rival, pid):
        yield Server(DYNAMO, rival.port, Process("frontend", pid))
