"""`kvferry up`: the whole stack on this machine.

1. Check what can be checked before anything is loaded: transport, key file, ports, another stack.
2. Find the model, fetching it if it is a known name (`weights.py`).
3. Start the embedded NATS server, unless a server is named; connect to it.
4. Write the run file.
5. Supervise workers and gateways; when all are ready and the first gateway sees them all, say so. Add and drain
   workers when that is asked for (`control.py`).
6. On Ctrl-C drain in order, remove the run file, stop NATS.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes.util
import importlib.util
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from pydantic import SecretStr

from kvferry.bus.base import least_payload
from kvferry.bus.nats import NatsBus
from kvferry.bus.server import EmbeddedNats
from kvferry.config import DATA_KEY_BYTES
from kvferry.errors import SettingError
from kvferry.runfile import RunFile, default_run_file
from kvferry.runtime import Runtime, SystemRuntime, now
from kvferry.text.model_dir import ModelDir
from kvferry_local.cluster import bus_settings
from kvferry_local.control import Crew, control_socket
from kvferry_local.keeper import keep_running, sole_owner
from kvferry_local.plan import Place, Plan, usable_cores
from kvferry_local.ports import base_url, claim
from kvferry_local.settings import UpSettings
from kvferry_local.stage import Stage
from kvferry_local.supervisor import Supervisor
from kvferry_local.terminal import Terminal

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # HUP: its terminal was closed


def check_settings(settings: UpSettings) -> None:
    """What would fail later, and slower. Raises `SettingError`."""
    has_ucx = importlib.util.find_spec("libucx") is not None or ctypes.util.find_library("ucp") is not None
    if settings.transport == "ucx" and not has_ucx:
        raise SettingError("--transport", "ucx is not installed: pip install 'kvferry[ucx]', or use tcp")
    if settings.api_key_file is not None and not settings.api_key_file.is_file():
        raise SettingError("--api-key-file", f"{settings.api_key_file} does not exist")
    claim(settings.host, settings.port, settings.gateways)


async def up(settings: UpSettings, model_dir: Path, model_name: str) -> None:
    """Run until asked to stop. Raises `StackFailed`, `SettingError`, `BusUnavailable`, `CheckpointError`."""
    began = now()
    runtime = SystemRuntime()
    run_file = (settings.run_file or default_run_file(os.environ, settings.cluster)).absolute()
    with sole_owner(run_file):
        ports = claim(settings.host, settings.port, settings.gateways)
        async with control_plane(settings, runtime) as credentials:
            facts = credentials.model_copy(
                update={
                    "gateways": tuple(base_url(settings.host, port) for port in ports),
                    "model_dir": str(model_dir),
                    "served_model_name": model_name,
                }
            )
            facts.write(run_file)
            # The children ask for it, too, but a worker only when it has loaded its model.
            context = ModelDir(model_dir).max_context
            min_payload = least_payload(min(settings.max_model_len or context, context))
            bus = NatsBus(bus_settings(facts, "kvferry-up", min_payload), runtime)
            await bus.start()
            try:
                await supervise(settings, facts, run_file, ports, bus, began)
            finally:
                await bus.close()


@contextlib.asynccontextmanager
async def control_plane(settings: UpSettings, runtime: Runtime) -> AsyncIterator[RunFile]:
    """The NATS server that was named, or one of our own: a run file without gateways and model."""
    data_key = settings.data_key.get_secret_value() or runtime.random_bytes(DATA_KEY_BYTES).hex()
    if settings.nats_url:
        yield RunFile(
            cluster=settings.cluster,
            pid=os.getpid(),
            nats_url=settings.nats_url,
            nats_user=settings.nats_user,
            nats_password=settings.nats_password,
            nats_token=settings.nats_token,
            nats_tls_ca=settings.nats_tls_ca,
            data_key=SecretStr(data_key),
        )
        return
    server = EmbeddedNats(runtime)
    await server.start()
    keeper = asyncio.get_running_loop().create_task(keep_running(server), name="keep nats-server")
    try:
        yield RunFile(
            cluster=settings.cluster,
            pid=os.getpid(),
            nats_url=server.url,
            nats_user=server.user,
            nats_password=SecretStr(server.password),
            data_key=SecretStr(data_key),
        )
    finally:
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await server.stop()


async def supervise(
    settings: UpSettings, facts: RunFile, run_file: Path, ports: tuple[int, ...], bus: NatsBus, began: float
) -> None:
    """Steps 5 and 6."""
    interactive = settings.log_format == "console" or (settings.log_format == "auto" and Terminal.attached())
    plan = Plan(
        settings,
        Place(
            run_file=run_file,
            model_dir=Path(facts.model_dir),
            served_model_name=facts.served_model_name,
            ports=ports,
            cores=usable_cores(),
            log_format="console" if interactive else "json",
        ),
    )
    planned = plan.programs()
    terminal = Terminal([program.name for program in planned])
    stage = Stage(settings, facts.served_model_name, facts.gateways[0], terminal, bus, began)
    supervisor = Supervisor(planned, settings.drain_grace, stage)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, supervisor.ask_stop)
    terminal.begin()
    crew = Crew(plan, supervisor, settings.prefill, settings.decode)
    try:
        async with control_socket(run_file, crew):
            await supervisor.run()
    finally:
        terminal.end()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
