"""Starts, serves, drains and ends one gateway."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import uvicorn

from kvferry import ready
from kvferry.bus.base import Bus, BusSettings, least_payload
from kvferry.bus.nats import NatsBus
from kvferry.errors import KvferryError, SettingError
from kvferry.log import get_logger
from kvferry.runtime import Runtime, SystemRuntime, stop_signals
from kvferry.text.model_dir import ModelDir
from kvferry.wire.subjects import inbox_prefix
from kvferry_gateway.app import GatewayApp
from kvferry_gateway.auth import ApiKeys
from kvferry_gateway.completions import Completions
from kvferry_gateway.fleet import Fleet
from kvferry_gateway.http import GatewayProtocol
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.prompt import Prompter
from kvferry_gateway.rate_limit import RateLimits
from kvferry_gateway.scaling import read_targets
from kvferry_gateway.settings import GatewaySettings
from kvferry_gateway.tokenize import TokenService

KEY_REFRESH_S: Final = 1.0
SHUTDOWN_SLACK_S: Final = 5.0  # for answers that are being written when the grace time ends
BACKLOG: Final = 2048  # connections that the kernel may hold for us

log = get_logger(__name__)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the service has its own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway's parts. A simulation takes `app` and enters through ASGI."""

    settings: GatewaySettings
    bus: Bus
    fleet: Fleet
    completions: Completions
    prompter: Prompter
    keys: ApiKeys | None
    app: GatewayApp

    @classmethod
    async def start(
        cls, settings: GatewaySettings, runtime: Runtime, bus: Bus, model: ModelDir, *, pid: int, created: int
    ) -> Gateway:
        """Join a bus that is connected. Raises `SettingError`, `CheckpointError`, `BusUnavailable`."""
        limits = RateLimits(settings.requests_per_minute, settings.tokens_per_minute)
        keys = None if settings.api_key_file is None else ApiKeys(settings.api_key_file, limits)
        model_name = settings.served_model_name or model.name
        if unapplied := model.sampling.unapplied:
            log.warning("generation_config.json recommends what is not applied", fields=list(unapplied))
        targets = read_targets(settings.scaling_file)
        prompter = Prompter(model, runtime, settings.tool_call_parser, settings.reasoning_parser)
        fleet = Fleet(settings, runtime, bus, GatewayMetrics(), pid, targets)
        completions = Completions(fleet, prompter, model_name, model.max_context)
        app = GatewayApp(fleet, completions, TokenService(prompter, model_name), keys, model_name, created)
        gateway = cls(settings, bus, fleet, completions, prompter, keys, app)
        try:
            await fleet.start()
        except BaseException:
            await gateway.stop()
            raise
        if keys is not None:
            fleet.tasks.spawn(_refresh(keys), "keys")
        return gateway

    async def stop(self) -> None:
        """Nothing of it is left but the bus."""
        await self.fleet.stop()
        self.prompter.close()


async def _refresh(keys: ApiKeys) -> None:
    while True:
        await asyncio.sleep(KEY_REFRESH_S)
        keys.refresh()


def bus_settings(settings: GatewaySettings, max_context: int) -> BusSettings:
    return BusSettings(
        url=settings.nats_url,
        name=settings.name,
        inbox_prefix=inbox_prefix(settings.cluster, "gateway"),
        user=settings.nats_user,
        password=settings.nats_password.get_secret_value(),
        token=settings.nats_token.get_secret_value(),
        tls_ca=settings.nats_tls_ca,
        min_payload=least_payload(max_context),
    )


def listen(host: str, port: int) -> socket.socket:
    """Raises `SettingError` if the address is taken or not ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        setting = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        raise SettingError(setting, f"can't listen on {host}:{port}: {error.strerror}") from None


class HttpServer:
    """The HTTP side: from a bound socket until the last connection is closed."""

    def __init__(self, app: GatewayApp, listener: socket.socket, settings: GatewaySettings, shutdown_s: float) -> None:
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener = listener
        self._server = _Server(
            uvicorn.Config(
                app,
                http=GatewayProtocol.with_receive_timeout(settings.receive_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_timeout,
                timeout_graceful_shutdown=int(shutdown_s),
                backlog=BACKLOG,
            )
        )
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._server.serve([self._listener]), name="http")

    async def ended(self) -> None:
        """Returns when it has ended, by `stop` or by a failure of its own, which it raises."""
        assert self._task is not None
        await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Accept no more connections; let those that have a request under way finish it."""
        self._server.should_exit = True
        if self._task is not None:
            await self._task


async def serve(settings: GatewaySettings) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises `SettingError`, `CheckpointError`, `BusUnavailable`."""
    if not settings.model:
        raise SettingError("--model", "is not set; give a model directory in Hugging Face form")
    runtime = SystemRuntime()
    ready.report("load")
    model = ModelDir(settings.model)
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        bus = NatsBus(bus_settings(settings, model.max_context), runtime)
        await bus.start()
        try:
            with stop_signals(asyncio.get_running_loop()) as stop:
                await _serve(settings, runtime, bus, model, listener, stop)
        finally:
            await bus.close()


async def _serve(
    settings: GatewaySettings,
    runtime: Runtime,
    bus: Bus,
    model: ModelDir,
    listener: socket.socket,
    stop: asyncio.Event,
) -> None:
    gateway = await Gateway.start(settings, runtime, bus, model, pid=os.getpid(), created=int(runtime.wall_clock()))
    try:
        http = HttpServer(gateway.app, listener, settings, settings.drain_grace + SHUTDOWN_SLACK_S)
        await http.start()
        host, port = http.address
        log.info("ready", host=host, port=port, incarnation=f"{gateway.fleet.incarnation:016x}")
        ready.report("ready", incarnation=gateway.fleet.incarnation, port=port)
        waits = [asyncio.ensure_future(wait) for wait in (stop.wait(), gateway.fleet.failed.wait(), http.ended())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
        log.info("draining")
        await gateway.completions.drain(settings.drain_grace)
        await http.stop()
        if gateway.fleet.failed.is_set():
            raise KvferryError("a task of the gateway has failed; its log says which")
    finally:
        await gateway.stop()
