"""Who starts workers and lets them drain.

Each of them stops a worker with SIGTERM, which it answers by draining, and waits for longer than its `drain_grace`
before it would kill: `kvferry up` waits for ever, compose for `stop_grace_period`, Kubernetes for
`terminationGracePeriodSeconds`. So no worker is killed that has not drained.
"""

from __future__ import annotations

import re
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
PLACEHOLDERS: Final = ("{role}", "{replicas}")  # that must be there
PLACEHOLDER: Final = re.compile(r"\{(role|replicas|model)\}")


class ScalingFailed(KvferryError):
    """The target did not do what it was told; it is told again."""


class ScaleTarget(ABC):
    """Where the workers run."""

    tells_models_apart: bool  # else it may only be asked about one model

    @abstractmethod
    async def replicas(self, model: str, seen: Mapping[Role, int]) -> dict[Role, int]:
        """Workers of a model ordered so far, started yet or not. `seen`: those that the gateway sees.

        Raises `ScalingFailed`.
        """

    @abstractmethod
    async def scale(self, model: str, role: Role, replicas: int) -> None:
        """Order so many. May return when they are there, or before. Raises `ScalingFailed`."""


class LocalTarget(ScaleTarget):
    """`kvferry up` on this machine, through the socket beside its run file."""

    tells_models_apart = True

    def __init__(self, run_file: Path) -> None:
        self._run_file = run_file

    async def replicas(self, model: str, seen: Mapping[Role, int]) -> dict[Role, int]:
        return (await ask_stack(self._run_file, {}, model))[model]

    async def scale(self, model: str, role: Role, replicas: int) -> None:
        await ask_stack(self._run_file, {role: replicas}, model)


class CommandTarget(ScaleTarget):
    """A command of the operator's, with `{role}`, `{replicas}` and perhaps `{model}` in it; run without a shell."""

    def __init__(self, command: str) -> None:
        if missing := [word for word in PLACEHOLDERS if word not in command]:
            raise SettingError("--command", f"has no {' and no '.join(missing)}")
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise SettingError("--command", f"{error}".lower()) from None
        self.tells_models_apart = "{model}" in command
        self._ordered: dict[str, dict[Role, int]] = {}

    async def replicas(self, model: str, seen: Mapping[Role, int]) -> dict[Role, int]:
        return {**seen, **self._ordered.get(model, {})}

    async def scale(self, model: str, role: Role, replicas: int) -> None:
        values = {"{role}": role, "{replicas}": str(replicas), "{model}": model}
        await run_command(*(PLACEHOLDER.sub(lambda found: values[found[0]], word) for word in self._words))
        self._ordered.setdefault(model, {})[role] = replicas


class ComposeTarget(ScaleTarget):
    """docker compose in this directory, whose services are one model's."""

    tells_models_apart = False

    async def replicas(self, model: str, seen: Mapping[Role, int]) -> dict[Role, int]:
        running = (await run_command(*COMPOSE, "ps", "--status", "running", "--format", "{{.Service}}")).split()
        return {role: running.count(role) for role in seen}

    async def scale(self, model: str, role: Role, replicas: int) -> None:
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
