"""`kvferry status` and `kvferry drain`: what the registry sees, and a word to one worker."""

from __future__ import annotations

from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.bus.base import BusSettings
from kvferry.bus.nats import NatsBus
from kvferry.errors import SettingError
from kvferry.runfile import RunFile
from kvferry.runtime import SystemRuntime
from kvferry.wire.messages import WORKER_ROLES, Codecs, Drain
from kvferry.wire.subjects import inbox_prefix, process_subject
from kvferry_local.client import Target, check, request_errors
from kvferry_local.settings import ClientSettings

TIMEOUT: Final = httpx.Timeout(5.0)
MAX_WIDTH: Final = 1000  # characters of a line where nobody watches

Worker = dict[str, Any]


def workers_of(target: Target, settings: ClientSettings) -> list[Worker]:
    """Rows of `/v1/cluster`. Raises `RequestFailed`."""
    with target.open(settings, TIMEOUT) as http, request_errors(target.url):
        response = http.get("/v1/cluster")
        check(response)
        return list(response.json()["workers"])


def show_status(target: Target, settings: ClientSettings) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("NAME", "ROLE", "STATE", "PID", "MODEL", "TRANSPORT", "WAITING", "RUNNING", "FREE BLOCKS"):
        table.add_column(column, justify="right" if column in ("PID", "WAITING", "RUNNING", "FREE BLOCKS") else "left")
    workers = workers_of(target, settings)
    for worker in workers:
        load = worker["load"]
        table.add_row(
            *(str(worker[key]) for key in ("name", "role", "state", "pid", "model", "transport")),
            *(str(load[key]) for key in ("num_waiting", "num_running", "free_blocks")),
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = MAX_WIDTH  # a program that reads this wants whole names
    console.print(table)
    for worker in workers:
        console.print(Text(f"{worker['name']}: engine {worker['engine']}, {worker['engine_reason']}"), soft_wrap=True)


def bus_settings(run_file: RunFile, name: str, min_payload: int = 0) -> BusSettings:
    return BusSettings(
        url=run_file.nats_url,
        name=name,
        inbox_prefix=inbox_prefix(run_file.cluster, "operator"),
        user=run_file.nats_user,
        password=run_file.nats_password.get_secret_value(),
        token=run_file.nats_token.get_secret_value(),
        tls_ca=run_file.nats_tls_ca,
        min_payload=min_payload,
    )


async def drain(run_file: RunFile, worker: Worker) -> None:
    """Ask one worker to take no more and to end. Returns when the message is on the bus."""
    incarnation = int(worker["incarnation"], 16)
    bus = NatsBus(bus_settings(run_file, "kvferry-drain"), SystemRuntime())
    await bus.start()
    try:
        subject = process_subject(run_file.cluster, worker["role"], worker["name"], incarnation)
        await bus.publish(subject, Codecs().to_worker.encode(Drain(incarnation)))
    finally:
        await bus.close()


def worker_named(workers: list[Worker], name: str) -> Worker:
    """Raises `SettingError` for a name that no live worker has."""
    candidates = [worker for worker in workers if worker["role"] in WORKER_ROLES]
    for worker in candidates:
        if worker["name"] == name:
            return worker
    names = ", ".join(sorted(worker["name"] for worker in candidates)) or "none"
    raise SettingError("WORKER", f"no worker is named {name!r}; there are: {names}")
