"""Who starts workers and lets them drain.

Each of them stops a worker with SIGTERM, which it answers by draining, and waits for longer than its `drain_grace`
before it would kill: `kvferry up` waits for ever, compose for `stop_grace_period`, Kubernetes for
`terminationGracePeriodSeconds`. So no worker is killed that has not drained.
"""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from kvferry.errors import KvferryError, SettingError
from kvferry_local.control import ask_stack
from kvferry_local.process import outcome_of
from kvferry_local.supervision import Role

COMMAND_TIMEOUT_S: Final = 300.0
MAX_ERROR_CHARS: Final = 500
COMPOSE: Final = ("docker", "compose")
COMPOSE_UP_FLAGS: Final = ("--detach", "--no-build", "--no-deps", "--no-recreate")
PLACEHOLDERS: Final = ("{role}", "{replicas}")


class ScalingFailed(KvferryError):
    """The target did not do what it was told; it is told again."""


class ScaleTarget(ABC):
    """Where the workers run."""

    @abstractmethod
    async def replicas(self, seen: Mapping[Role, int]) -> dict[Role, int]:
        """Workers ordered so far, started yet or not. `seen`: those that the gateway sees. Raises `ScalingFailed`."""

    @abstractmethod
    async def scale(self, role: Role, replicas: int) -> None:
        """Order so many. May return when they are there, or before. Raises `ScalingFailed`."""


class LocalTarget(ScaleTarget):
    """`kvferry up` on this machine, through the socket beside its run file."""

    def __init__(self, run_file: Path) -> None:
        self._run_file = run_file

    async def replicas(self, seen: Mapping[Role, int]) -> dict[Role, int]:
        return await ask_stack(self._run_file, {})

    async def scale(self, role: Role, replicas: int) -> None:
        await ask_stack(self._run_file, {role: replicas})


class CommandTarget(ScaleTarget):
    """A command of the operator's, with `{role}` and `{replicas}` in it; run without a shell."""

    def __init__(self, command: str) -> None:
        if missing := [word for word in PLACEHOLDERS if word not in command]:
            raise SettingError("--command", f"has no {' and no '.join(missing)}")
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise SettingError("--command", f"{error}".lower()) from None
        self._ordered: dict[Role, int] = {}

    async def replicas(self, seen: Mapping[Role, int]) -> dict[Role, int]:
        return {**seen, **self._ordered}

    async def scale(self, role: Role, replicas: int) -> None:
        words = [word.replace("{role}", role).replace("{replicas}", str(replicas)) for word in self._words]
        await run_command(*words)
        self._ordered[role] = replicas


class ComposeTarget(ScaleTarget):
    """docker compose in this directory."""

    async def replicas(self, seen: Mapping[Role, int]) -> dict[Role, int]:
        running = (await run_command(*COMPOSE, "ps", "--status", "running", "--format", "{{.Service}}")).split()
        return {role: running.count(role) for role in seen}

    async def scale(self, role: Role, replicas: int) -> None:
        await run_command(*COMPOSE, "up", *COMPOSE_UP_FLAGS, "--scale", f"{role}={replicas}", role)


async def run_command(*words: str) -> str:
    """Its stdout. Raises `ScalingFailed` with the end of its stderr."""
    try:
        returncode, out, problem = await outcome_of(words, COMMAND_TIMEOUT_S)
    except TimeoutError:  # before OSError, which it is one of
        raise ScalingFailed(f"{words[0]}: no end after {COMMAND_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise ScalingFailed(f"{words[0]}: {error.strerror}") from None
    if returncode:
        detail = " ".join(problem.decode(errors="replace").split())[-MAX_ERROR_CHARS:]
        raise ScalingFailed(f"{words[0]}: ended with {returncode}: {detail}")
    return out.decode(errors="replace")
