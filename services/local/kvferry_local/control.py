"""How many workers a running `kvferry up` has, and the word to have more or fewer.

A Unix socket beside the run file, as private as that. One JSON line asks, one answers:

    {"scale": {"decode": 3}, "model": "m"}   ->   {"replicas": {"m": {"prefill": 1, "decode": 3}}}   or   {"error": "…"}

Without a model, or with null for it, each model of the stack is meant.

A worker that is taken away drains: it gets SIGTERM and is waited for, never SIGKILL.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from kvferry.errors import KvferryError, SettingError
from kvferry.log import get_logger
from kvferry_local.plan import Plan, worker_name
from kvferry_local.settings import MAX_PROCESSES
from kvferry_local.supervision import Role
from kvferry_local.supervisor import Supervisor

MAX_ASK_BYTES: Final = 4096
ASK_TIMEOUT_S: Final = 10.0
LEAST: Final[Mapping[Role, int]] = {"prefill": 0, "decode": 1}  # without prefill, decode workers prefill, too
MAX_SOCKET_PATH_BYTES: Final = 103  # what every system's sockaddr_un takes

log = get_logger(__name__)


class ControlRefused(KvferryError):
    """The stack does not do what was asked, or cannot be asked."""


class Crew:
    """The workers of a running stack, by model and role: those that are to stay."""

    def __init__(self, plan: Plan, supervisor: Supervisor) -> None:
        self._plan = plan
        self._supervisor = supervisor
        self._models = {model.name: model for model in plan.models}
        self._indices: dict[str, dict[Role, list[int]]] = {
            name: {role: [index for owner, index in plan.first_workers(role) if owner == model] for role in LEAST}
            for name, model in self._models.items()
        }

    def replicas(self, model: str | None) -> dict[str, dict[str, int]]:
        """Of one model, or of each. Raises `ControlRefused` for an unknown one."""
        return {
            name: {role: len(indices) for role, indices in self._indices[name].items()} for name in self._meant(model)
        }

    def scale(self, role: Role, wanted: int, model: str | None) -> None:
        """Add or retire workers of one model, or of each, the youngest first.

        Raises `ControlRefused` for a number out of bounds or an unknown model.
        """
        if not LEAST[role] <= wanted <= MAX_PROCESSES:
            raise ControlRefused(f"{role}: {wanted} is not in {LEAST[role]} to {MAX_PROCESSES}")
        for name in self._meant(model):
            self._scale(role, wanted, name)

    def _meant(self, model: str | None) -> list[str]:
        if model is not None and model not in self._models:
            raise ControlRefused(f"no model is called {model!r}; there are: {', '.join(self._models)}")
        return list(self._models) if model is None else [model]

    def _scale(self, role: Role, wanted: int, model: str) -> None:
        indices = self._indices[model][role]
        before = len(indices)
        while len(indices) > wanted:
            self._supervisor.retire(worker_name(role, indices.pop()))
        while len(indices) < wanted:
            # A name that still drains is not free.
            taken = self._supervisor.names
            index = next(index for index in range(2 * MAX_PROCESSES) if worker_name(role, index) not in taken)
            self._supervisor.add(self._plan.worker(role, index, self._models[model]))
            indices.append(index)
        if before != wanted:
            log.info("scaled", model=model, role=role, before=before, replicas=wanted)


def socket_path(run_file: Path) -> Path:
    return run_file.with_suffix(".sock")


@contextlib.asynccontextmanager
async def control_socket(run_file: Path, crew: Crew) -> AsyncIterator[None]:
    """Listens while the stack runs. A path too long for a socket leaves the stack without one, with a warning."""
    path = socket_path(run_file)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        log.warning("the run file's path is too long for a socket beside it: this stack cannot be scaled")
        yield
        return
    path.unlink(missing_ok=True)  # of a stack that was killed; the run file's lock says that none runs
    listener = socket.socket(socket.AF_UNIX)
    mask = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(mask)
    server = await asyncio.start_unix_server(_Session(crew).serve, sock=listener, limit=MAX_ASK_BYTES)
    try:
        yield
    finally:
        server.close()
        await server.wait_closed()
        path.unlink(missing_ok=True)


class _Session:
    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(ASK_TIMEOUT_S):
                try:
                    answer = self._answer(await reader.readline())
                except ValueError:  # the line is too long
                    answer = {"error": "the request is too long"}
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
        writer.close()

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            document = json.loads(line)
            asked, model = document["scale"], document.get("model")
            wanted = {role: asked[role] for role in LEAST if role in asked}
            known = isinstance(asked, dict) and len(wanted) == len(asked)
            named = model is None or isinstance(model, str)
            if not known or not named or not all(type(count) is int for count in wanted.values()):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            return {"error": f'ask {{"scale": {{"decode": 2}}}}; roles: {", ".join(LEAST)}'}
        try:
            for role, count in wanted.items():
                self._crew.scale(role, count, model)
            return {"replicas": self._crew.replicas(model)}
        except ControlRefused as refused:
            return {"error": str(refused)}


def parse_scale(words: Sequence[str]) -> dict[Role, int]:
    """`decode=3` as the command line has it. Raises `SettingError`."""
    wanted: dict[Role, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        role = next((role for role in LEAST if role == name), None)
        if role is None or not number.isdecimal():
            raise SettingError("ROLE=N", f"{word!r} is none; as in: prefill=2 decode=3")
        wanted[role] = int(number)
    return wanted


async def ask_stack(run_file: Path, scale: Mapping[Role, int], model: str | None = None) -> dict[str, dict[Role, int]]:
    """The numbers of workers by model after `scale`; without any, those that are. `model` None: each model.

    Raises `ControlRefused`, `SettingError`.
    """
    path = socket_path(run_file)
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=MAX_ASK_BYTES)
            try:
                writer.write(json.dumps({"scale": dict(scale), "model": model}).encode() + b"\n")
                answer = json.loads(await reader.readline())
            finally:
                writer.close()
    except FileNotFoundError:
        raise SettingError("--run-file", f"{path} does not exist; is `kvferry up` running?") from None
    except (OSError, ValueError, TimeoutError) as error:
        raise ControlRefused(f"{path}: {str(error) or type(error).__name__}") from None
    if "error" in answer:
        raise ControlRefused(str(answer["error"]))
    replicas: dict[str, dict[Role, int]] = answer["replicas"]
    return replicas
