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
import ctypes.util
import importlib.util
import os
import signal
from pathlib import Path
from typing import Final

from kvferry.bus.base import least_payload
from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.certificate import ServerCertificate
from kvferry.errors import SettingError
from kvferry.model_source import ModelSource
from kvferry.runfile import RunFile, default_run_file
from kvferry.runtime import SystemRuntime, now
from kvferry.text.model_dir import ModelDir
from kvferry_local.control import Crew, control_socket
from kvferry_local.control_plane import check_logins, control_plane
from kvferry_local.keeper import sole_owner
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
    if settings.tls_cert is not None:
        ServerCertificate(settings.tls_cert, settings.tls_key, settings.tls_key_password)
    claim(settings.host, settings.port, settings.gateways)


async def up(settings: UpSettings, models: tuple[ModelSource, ...]) -> None:
    """Serve these models, each with its name and its directory, until asked to stop.

    Raises `StackFailed`, `SettingError`, `BusUnavailable`, `CheckpointError`.
    """
    began = now()
    runtime = SystemRuntime()
    run_file = (settings.run_file or default_run_file(os.environ, settings.cluster)).absolute()
    with sole_owner(run_file):
        ports = claim(settings.host, settings.port, settings.gateways)
        scheme = "http" if settings.tls_cert is None else "https"
        async with control_plane(settings, runtime) as credentials:
            facts = credentials.model_copy(
                update={
                    "gateway_certificate": "" if settings.tls_cert is None else str(settings.tls_cert.absolute()),
                    "gateways": tuple(base_url(settings.host, port, scheme) for port in ports),
                    "model": tuple(map(str, models)),
                }
            )
            facts.write(run_file)
            # The children ask for it, too, but a worker only when it has loaded its model.
            context = max(ModelDir(model.where).max_context for model in models)
            min_payload = least_payload(min(settings.max_model_len or context, context))
            bus = NatsBus(bus_login(facts.in_role("operator"), "operator", "kvferry-up", min_payload), runtime)
            await bus.start()
            try:
                if settings.nats_credentials is not None:
                    await check_logins(facts, runtime)
                await supervise(settings, models, facts, run_file, ports, bus, began)
            finally:
                await bus.close()


async def supervise(
    settings: UpSettings,
    models: tuple[ModelSource, ...],
    facts: RunFile,
    run_file: Path,
    ports: tuple[int, ...],
    bus: NatsBus,
    began: float,
) -> None:
    """Steps 5 and 6."""
    interactive = settings.log_format == "console" or (settings.log_format == "auto" and Terminal.attached())
    plan = Plan(
        settings,
        Place(
            run_file=run_file,
            models=models,
            ports=ports,
            cores=usable_cores(),
            log_format="console" if interactive else "json",
        ),
    )
    planned = plan.programs()
    terminal = Terminal([program.name for program in planned])
    stage = Stage(settings, [model.name for model in models], facts.gateways[0], terminal, bus, began)
    supervisor = Supervisor(planned, settings.drain_grace, stage)
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, supervisor.ask_stop)
    terminal.begin()
    crew = Crew(plan, supervisor)
    try:
        async with control_socket(run_file, crew):
            await supervisor.run()
    finally:
        terminal.end()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)
