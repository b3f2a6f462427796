"""`kvferry status` and `kvferry drain`: what the registry sees, and a word to one worker."""

from __future__ import annotations

from typing import Any, Final

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvferry.bus.login import bus_login
from kvferry.bus.nats import NatsBus
from kvferry.errors import SettingError
from kvferry.runfile import RunFile
from kvferry.runtime import SystemRuntime
from kvferry.wire.fields import WORKER_ROLES
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Drain
from kvferry.wire.subjects import mail_subject, process_subject
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
    workers = sorted(workers_of(target, settings), key=lambda worker: (worker["role"], worker["name"]))
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
        ranks = f" on {worker['ranks']} ranks" if worker.get("ranks", 1) > 1 else ""
        remarks = [f"engine {worker['engine']}{ranks}, {worker['engine_reason']}"]
        if (why := worker.get("unserved")) is not None:
            remarks.append(f"gets no request: {why}")
        remarks += [f"takes no KV from {other}: {why}" for other, why in worker.get("refuses", {}).items()]
        for remark in remarks:
            console.print(Text(f"{worker['name']}: {remark}"), soft_wrap=True)


async def drain(run_file: RunFile, worker: Worker) -> None:
    """Ask one worker to take no more and to end. Returns when the message is on the bus."""
    incarnation = int(worker["incarnation"], 16)
    bus = NatsBus(bus_login(run_file.in_role("operator"), "operator", "kvferry-drain"), SystemRuntime())
    await bus.start()
    try:
        process = process_subject(run_file.cluster, worker["role"], worker["name"], incarnation)
        await bus.publish(mail_subject(process, "operator"), Codecs().to_worker.encode(Drain(incarnation)))
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
