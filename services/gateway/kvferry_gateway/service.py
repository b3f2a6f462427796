"""Starts, serves, drains and ends one gateway."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import uvicorn

from kvferry import ready
from kvferry.bus.base import Bus, least_payload
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.certificate import ServerCertificate
from kvferry.errors import KvferryError, SettingError
from kvferry.http_port import QuietServer
from kvferry.log import get_logger
from kvferry.model_source import check_different
from kvferry.runtime import Runtime, SystemRuntime, stop_signals
from kvferry.text.model_dir import ModelDir
from kvferry.text.vocabulary import vocabulary_id
from kvferry.trace.factory import open_exporter
from kvferry.trace.span import SpanExporter
from kvferry_gateway.app import GatewayApp
from kvferry_gateway.completions import Completions
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.http.auth import ApiKeys
from kvferry_gateway.http.rate_limit import RateLimits
from kvferry_gateway.http.server import GatewayProtocol
from kvferry_gateway.metrics import GatewayMetrics
from kvferry_gateway.models import Models, ServedModel
from kvferry_gateway.placement.scaling import read_targets
from kvferry_gateway.requests.prompt import Prompter
from kvferry_gateway.settings import GatewaySettings

FILE_REFRESH_S: Final = 1.0
FILE_NICE: Final = 5
SHUTDOWN_SLACK_S: Final = 5.0  # for answers that are being written when the grace time ends
BACKLOG: Final = 2048  # connections that the kernel may hold for us

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Gateway:
    """One gateway's parts. A simulation takes `app` and enters through ASGI."""

    settings: GatewaySettings
    bus: Bus
    fleet: Fleet
    completions: Completions
    models: Models
    keys: ApiKeys | None
    certificate: ServerCertificate | None
    app: GatewayApp

    @classmethod
    async def start(
        cls,
        settings: GatewaySettings,
        runtime: Runtime,
        bus: Bus,
        directories: Mapping[str, ModelDir],
        *,
        pid: int,
        created: int,
        spans: SpanExporter | None = None,
    ) -> Gateway:
        """Join a bus that is connected. `directories`: the models to serve, by their names in requests.

        Raises `SettingError`, `CheckpointError`, `BusUnavailable`.
        """
        limits = RateLimits(settings.requests_per_minute, settings.tokens_per_minute)
        keys = None if settings.api_key_file is None else ApiKeys(settings.api_key_file, limits)
        certificate = (
            None
            if settings.tls_cert is None
            else ServerCertificate(settings.tls_cert, settings.tls_key, settings.tls_key_password)
        )
        targets = read_targets(settings.scaling_file, directories)
        models = Models(served(name, directory, settings, runtime) for name, directory in directories.items())
        fleet = Fleet(settings, runtime, bus, GatewayMetrics(models.names), pid, models, targets, spans)
        completions = Completions(fleet, models)
        app = GatewayApp(fleet, completions, models, keys, created)
        gateway = cls(settings, bus, fleet, completions, models, keys, certificate, app)
        try:
            await fleet.start()
        except BaseException:
            await gateway.stop()
            raise
        if files := [file for file in (keys, certificate) if file is not None]:
            fleet.tasks.spawn(_refresh(files, runtime), "files")
        return gateway

    async def stop(self) -> None:
        """Nothing of it is left but the bus."""
        await self.fleet.stop()
        self.models.close()


def served(name: str, directory: ModelDir, settings: GatewaySettings, runtime: Runtime) -> ServedModel:
    """Raises `CheckpointError`."""
    if unapplied := directory.sampling.unapplied:
        log.warning("generation_config.json recommends what is not applied", model=name, fields=list(unapplied))
    prompter = Prompter(directory, runtime, settings.tool_call_parser, settings.reasoning_parser)
    return ServedModel(name, prompter, directory.max_context, vocabulary_id(directory.tokenizer_path))


def open_models(settings: GatewaySettings) -> dict[str, ModelDir]:
    """By their names in requests. Raises `SettingError`, `CheckpointError`."""
    sources = settings.sources
    if not sources:
        raise SettingError("--model", "is not set; give model directories in Hugging Face form")
    check_different(source.served_name for source in sources)
    return {source.served_name: ModelDir(source.where) for source in sources}


async def _refresh(files: Sequence[ApiKeys | ServerCertificate], runtime: Runtime) -> None:
    with contextlib.closing(runtime.lane("files", nice=FILE_NICE)) as lane:
        while True:
            await asyncio.sleep(FILE_REFRESH_S)
            for file in files:
                await lane.run(file.refresh)


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

    def __init__(self, gateway: Gateway, listener: socket.socket, shutdown_s: float) -> None:
        settings, certificate = gateway.settings, gateway.certificate
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self._listener = listener
        self._server = QuietServer(
            uvicorn.Config(
                gateway.app,
                http=GatewayProtocol.with_limits(settings.receive_timeout),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_timeout,
                timeout_graceful_shutdown=int(shutdown_s),
                backlog=BACKLOG,
                ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
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
        self._server.end()
        if self._task is not None:
            await self._task


async def serve(settings: GatewaySettings) -> None:
    """Run until SIGTERM or SIGINT, then drain. Raises `SettingError`, `CheckpointError`, `BusUnavailable`."""
    directories = open_models(settings)
    runtime = SystemRuntime()
    spans = open_exporter(settings, runtime)
    ready.report("load")
    longest = max(directory.max_context for directory in directories.values())
    with contextlib.closing(listen(settings.host, settings.port)) as listener:
        bus = NatsBus(bus_login(settings, settings.role, settings.name, least_payload(longest)), runtime)
        await bus.start()
        try:
            with stop_signals(asyncio.get_running_loop()) as stop:
                await _serve(settings, runtime, bus, directories, listener, stop, spans)
        finally:
            await bus.close()


async def _serve(
    settings: GatewaySettings,
    runtime: Runtime,
    bus: Bus,
    directories: Mapping[str, ModelDir],
    listener: socket.socket,
    stop: asyncio.Event,
    spans: SpanExporter | None,
) -> None:
    created = int(runtime.wall_clock())
    gateway = await Gateway.start(settings, runtime, bus, directories, pid=os.getpid(), created=created, spans=spans)
    try:
        http = HttpServer(gateway, listener, settings.drain_grace + SHUTDOWN_SLACK_S)
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
