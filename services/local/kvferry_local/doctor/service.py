"""All checks, one after the other, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Any

import httpx
from rich.console import Console
from rich.text import Text

from kvferry.errors import KvferryError
from kvferry.model_source import model_sources
from kvferry.runfile import RunFile, default_run_file
from kvferry.scaling import KV_MEMORY_MB, SERVICES
from kvferry.text.model_dir import ModelDir
from kvferry_local.client import Target, client_settings
from kvferry_local.cluster import Worker, workers_of
from kvferry_local.doctor.bus import bus
from kvferry_local.doctor.clock import clock, peers_of
from kvferry_local.doctor.data_plane import data_plane
from kvferry_local.doctor.engine import engine
from kvferry_local.doctor.finding import Finding
from kvferry_local.doctor.machine import ports, shared_memory
from kvferry_local.doctor.model import find_model, memory
from kvferry_local.settings import DoctorSettings
from kvferry_local.trust import trust

UNKNOWN_CONTEXT = 8192  # tokens, where there is no model to ask
SIGNS = {"ok": ("ok  ", "green"), "warning": ("warn", "yellow"), "failed": ("FAIL", "bold red")}


async def findings(settings: DoctorSettings, run_file: RunFile | None) -> AsyncIterator[Finding]:
    """`run_file`: of the stack that runs, if one does."""
    directories = []
    for source in model_sources(settings.model, settings.served_model_name):
        directory, model = find_model(source.where)
        yield model
        if directory is not None:
            directories.append(directory)
    if directories and run_file is None:
        yield memory(directories, kv_pools(settings))
    async for finding in engine(settings, directories):
        yield finding
    async for finding in data_plane(settings):
        yield finding
    longest = max((ModelDir(directory).max_context for directory in directories), default=UNKNOWN_CONTEXT)
    max_context = settings.max_model_len or longest
    for finding in await bus(settings, max_context):
        yield finding
    yield ports(settings.host, settings.port, () if run_file is None else run_file.gateways)
    yield shared_memory()
    yield clock(peers(run_file, settings), lambda url: trust(url, settings.tls_ca, run_file))


def peers(run_file: RunFile | None, settings: DoctorSettings) -> dict[str, str]:
    """Every process of the running cluster that answers HTTP, by name."""
    gateways = settings.peers or (() if run_file is None else run_file.gateways)
    found = {url: url for url in gateways}
    for url in gateways:
        client = client_settings(None, {"url": url, "tls_ca": settings.tls_ca})
        try:
            workers: list[Worker] = workers_of(Target(url.rstrip("/"), run_file, ""), client)
        except (KvferryError, httpx.HTTPError, ValueError, KeyError):
            continue  # not asked for its workers: it may want a key
        found |= peers_of(workers)
    return found


def kv_pools(settings: DoctorSettings) -> list[int]:
    """MiB of each worker of one model. Raises `SettingError`."""
    return [
        int(SERVICES[role].read(settings.scaling_file).settings.get("kv_memory_mb", KV_MEMORY_MB))
        for role, count in (("prefill", settings.prefill), ("decode", settings.decode))
        for _ in range(count)
    ]


def running_stack(settings: DoctorSettings) -> RunFile | None:
    """The run file of a stack on this machine, if there is one. Raises `SettingError` for one that was named."""
    path = settings.run_file or default_run_file(os.environ, settings.cluster)
    if settings.run_file is None and not path.exists():
        return None
    return RunFile.read(path, "--run-file")


def beside(settings: DoctorSettings, run_file: RunFile) -> DoctorSettings:
    """The settings with the bus of a stack that runs, and its model, where no other ones were named."""
    changes: dict[str, Any] = {}
    if not settings.nats_url:
        bus_fields = ("cluster", "nats_url", "nats_user", "nats_password", "nats_token")
        tls_fields = ("nats_tls_ca", "nats_tls_cert", "nats_tls_key")
        access = run_file.in_role("operator")
        changes |= {field: getattr(access, field) for field in (*bus_fields, *tls_fields)}
    if settings.model == DoctorSettings.model_fields["model"].default and run_file.model:
        changes["model"] = run_file.model
    return settings.model_copy(update=changes)


async def examine(settings: DoctorSettings, run_file: RunFile | None, as_json: bool) -> bool:
    """Print what is found, as it is found; with `as_json` at the end, as one document. Whether nothing failed."""
    console = Console(highlight=False)
    found = []
    async for finding in findings(settings, run_file):
        found.append(finding)
        if not as_json:
            console.print(shown(finding), soft_wrap=True)
    healthy = not any(finding.status == "failed" for finding in found)
    if as_json:
        print(json.dumps({"healthy": healthy, "findings": [asdict(finding) for finding in found]}, indent=2))
    return healthy


def shown(finding: Finding) -> Text:
    sign, style = SIGNS[finding.status]
    text = Text.assemble((sign, style), f"  {finding.check}: {finding.detail}")
    if finding.remedy:
        text.append(f"\n      mend with: {finding.remedy}")
    return text
