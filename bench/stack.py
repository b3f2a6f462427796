"""A real `kvferry up` for the time of one benchmark: own ports, own run file, processes pinned to cores."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from bench.options import MODEL_NAME, Options
from bench.processes import Process, stack_processes
from kvferry.runfile import RunFile
from kvferry.runtime import blocking_clock, wall_clock
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.stream import Stream, stream

HOST: Final = "127.0.0.1"
ROOT: Final = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S: Final = 120.0
READY_POLL_S: Final = 0.05
READY_LINE: Final = "kvferry is ready on"
STOP_TIMEOUT_S: Final = 60.0
LOG_TAIL_CHARS: Final = 2000

Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class StackError(Exception):
    """`kvferry up` ended or did not become ready; a note holds the end of its log."""


@dataclass(slots=True)
class Stack:
    """A stack that is ready."""

    pid: int  # of `kvferry up`
    run_file: RunFile
    log: Path
    ready_s: float  # from the start of the process to its word that all is ready
    ready_at: float  # Unix seconds of that word

    @property
    def ports(self) -> list[int]:
        """Of the gateways."""
        return [port for url in self.run_file.gateways if (port := urlsplit(url).port) is not None]

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(HOST, self.port)

    async def complete(self, body: Mapping[str, Any], *, request_id: str = "", into: Stream | None = None) -> Stream:
        """Stream one completion; the model's name is filled in."""
        label = {"x-request-id": request_id} if request_id else None
        return await stream(self.endpoint, "/v1/completions", {"model": MODEL_NAME, **body}, headers=label, into=into)

    async def workers(self) -> list[dict[str, Any]]:
        """The workers' rows of /v1/cluster, by name."""
        rows = (await self.endpoint.get_json("/v1/cluster"))["workers"]
        return sorted((row for row in rows if row["role"] in ("prefill", "decode")), key=lambda row: str(row["name"]))

    async def processes(self) -> list[Process]:
        """Gateway and NATS from the process tree, workers as the cluster reports them."""
        workers = [Process(row["name"], row["pid"]) for row in await self.workers()]
        known = {process.pid for process in workers}
        return workers + [process for process in stack_processes(self.pid) if process.pid not in known]

    async def pin(self, cores: Mapping[str, Sequence[int]]) -> None:
        """Pin processes by the start of their name: {"prefill": [0], "decode": [1], "": [0]}; the longest wins."""
        for process in await self.processes():
            matching = [prefix for prefix in cores if process.name.startswith(prefix)]
            if matching:
                process.pin(cores[max(matching, key=len)])

    async def worker_json(self, role: str, path: str) -> list[Any]:
        """A document from the debug port of each worker of a role."""
        rows = [row for row in await self.workers() if row["role"] == role]
        return [await Endpoint(HOST, row["debug_port"]).get_json(path) for row in rows]

    async def metrics(self, role: str) -> Metrics:
        """Samples of all workers of a role, added up."""
        total: Metrics = {}
        for row in await self.workers():
            if row["role"] == role:
                text = (await Endpoint(HOST, row["debug_port"]).get("/metrics")).decode()
                for family in text_string_to_metric_families(text):
                    for sample in family.samples:
                        key = (sample.name, tuple(sorted(sample.labels.items())))
                        total[key] = total.get(key, 0.0) + sample.value
        return total


def metric(samples: Metrics, name: str, **labels: str) -> float:
    """One sample; 0 if it has not been counted yet."""
    return samples.get((name, tuple(sorted(labels.items()))), 0.0)


@asynccontextmanager
async def running(
    options: Options,
    *flags: str,
    settings: Mapping[str, str] | None = None,
    through_make: bool = False,
) -> AsyncIterator[Stack]:
    """Start a stack, yield it when it is ready, drain it afterwards.

    `flags` are those of `kvferry up`; `settings` reach its services by environment (`KVFERRY_<NAME>`).
    `through_make` starts it as `make run` does, whose time then counts, too.
    """
    with tempfile.TemporaryDirectory(prefix="kvferry-bench-") as folder:
        run_file, log = Path(folder) / "run.json", Path(folder) / "up.log"
        arguments = [
            *("--model", str(options.model_dir), "--served-model-name", MODEL_NAME),
            *("--port", "0", "--run-file", str(run_file), *flags),
        ]
        if through_make:
            program = ["make", "--no-print-directory", "-C", str(ROOT), "run", f"ARGS={shlex.join(arguments)}"]
        else:
            program = [str(Path(sys.executable).with_name("kvferry")), "up", *arguments]
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("KVFERRY_", "MAKE"))}
        environment |= {f"KVFERRY_{name.upper()}": value for name, value in (settings or {}).items()}
        began = blocking_clock()
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *program,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        try:
            await _wait_ready(process, log)
            ready_s = blocking_clock() - began
            yield Stack(process.pid, RunFile.read(run_file, "run_file"), log, ready_s, wall_clock())
        except Exception as error:
            error.add_note(f"the end of {log}:\n{_tail(log)}")
            raise
        finally:
            await _stop(process)


def _says_ready(log: Path) -> bool:
    return READY_LINE in log.read_text(errors="replace")


async def _wait_ready(process: asyncio.subprocess.Process, log: Path) -> None:
    deadline = blocking_clock() + READY_TIMEOUT_S
    while process.returncode is None and blocking_clock() < deadline:
        if _says_ready(log):
            return
        await asyncio.sleep(READY_POLL_S)
    reason = "not ready in time" if process.returncode is None else f"ended with {process.returncode}"
    raise StackError(f"kvferry up: {reason}")


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does: make passes nothing on
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise StackError("kvferry up did not end on SIGINT") from None


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
