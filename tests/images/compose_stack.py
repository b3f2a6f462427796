"""The stack of docker-compose.yml as a test sees it: a project of its own, a free port, containers to look into."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parents[2]
HOST: Final = "127.0.0.1"
BUILD_TIMEOUT_S: Final = 900.0  # cold, on a machine that does other things
COMMAND_TIMEOUT_S: Final = 180.0
PROJECT_LABEL: Final = "com.docker.compose.project"
SERVICE_LABEL: Final = "com.docker.compose.service"


def docker(*arguments: str, timeout: float = COMMAND_TIMEOUT_S, **options: Any) -> str:
    """Run one docker command; its stdout. Raises AssertionError with the end of its stderr."""
    return _run(["docker", *arguments], timeout, **options)


def _run(words: list[str], timeout: float, **options: Any) -> str:
    done = subprocess.run(
        words,
        cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False, **options,
    )  # fmt: skip
    assert done.returncode == 0, f"{' '.join(words)}: {done.returncode}\n{(done.stderr + done.stdout)[-4000:]}"
    return done.stdout


def require_docker() -> None:
    """Skips, with the reason, where no engine answers or the compose plugin is missing."""
    for command in (("docker", "info"), ("docker", "compose", "version")):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"no Docker engine: {error}")
        if done.returncode != 0:
            pytest.skip(f"no Docker engine with compose: {' '.join(done.stderr.split())[-200:]}")


def free_port() -> int:
    with socket.create_server((HOST, 0)) as probe:
        return int(probe.getsockname()[1])


def without_observers(command: str) -> str:
    """A line of the page without Prometheus and Grafana, whose images no registry here has: what would start all
    services starts the gateway and what it needs. This is all that the tests change of how a stack is started; its
    name, port and tag are in the environment."""
    if re.search(r"\bdocker compose\b.* up\b", command):
        return f"{command} gateway"
    return f"{command} ARGS=gateway" if "make compose-up" in command else command


@dataclass(frozen=True)
class Container:
    """One container and what `docker inspect` says of it."""

    id: str
    service: str
    facts: dict[str, Any]

    @property
    def addresses(self) -> set[str]:
        return {network["IPAddress"] for network in self.facts["NetworkSettings"]["Networks"].values()}

    @property
    def networks(self) -> list[str]:
        return list(self.facts["NetworkSettings"]["Networks"])

    @property
    def published(self) -> set[tuple[str, str, str]]:
        """(port inside, address outside, port outside)."""
        ports = self.facts["NetworkSettings"]["Ports"]
        return {(inside, b["HostIp"], b["HostPort"]) for inside, bound in ports.items() for b in bound or ()}

    def python(self, program: str, *arguments: str) -> str:
        """Run a program beside the container's own process, as its user."""
        return docker("exec", self.id, "python3", "-c", program, *arguments)

    def get(self, port: int, path: str) -> str:
        """An HTTP GET from inside, where `/debug` and `/v1/cluster` may be read."""
        program = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode())"
        return self.python(program, f"http://127.0.0.1:{port}{path}")


class ComposeStack:
    """One project: `run` a page's commands in it, look, `remove`."""

    def __init__(self) -> None:
        self.project = f"kvferry-test-{os.urandom(4).hex()}"
        self.port = free_port()
        self.environ = {"KVFERRY_PORT": str(self.port), "KVFERRY_TAG": "test", "COMPOSE_PROFILES": ""}
        self.environ |= {"COMPOSE_PROJECT_NAME": self.project, "COMPOSE_ANSI": "never"}

    def compose(self, *arguments: str, timeout: float = COMMAND_TIMEOUT_S) -> str:
        return docker("compose", *arguments, timeout=timeout, env={**os.environ, **self.environ})

    def run(self, *commands: str, **environ: str) -> str:
        """Commands of a page, in one shell; what they write. Such as start containers return when all are healthy."""
        script = "\n".join(("set -e", *map(without_observers, commands)))
        try:
            return _run(["sh", "-c", script], BUILD_TIMEOUT_S, env={**os.environ, **self.environ, **environ})
        except AssertionError as error:
            with contextlib.suppress(AssertionError):
                error.add_note(self.compose("logs", "--tail", "20"))
            raise

    def remove(self) -> None:
        """The project with its volumes and images."""
        self.compose("down", "--volumes", "--remove-orphans", "--timeout", "60", "--rmi", "all")

    def containers(self, *services: str, stopped: bool = False) -> list[Container]:
        """Those that run, of all services unless some are named; with `stopped` the others, too."""
        ids = docker("ps", "--quiet", *(["--all"] if stopped else []), "--filter", self._mine).split()
        found = [
            Container(facts["Id"], facts["Config"]["Labels"][SERVICE_LABEL], facts)
            for facts in (json.loads(docker("inspect", *ids)) if ids else [])
        ]
        return [container for container in found if not services or container.service in services]

    def one(self, service: str) -> Container:
        (container,) = self.containers(service)
        return container

    def cluster(self) -> list[dict[str, Any]]:
        """The workers that the gateway knows."""
        rows: list[dict[str, Any]] = json.loads(self.one("gateway").get(8000, "/v1/cluster"))["workers"]
        return rows

    def worker_of(self, row: dict[str, Any]) -> Container:
        """The container behind a row of `cluster()`."""
        address = row["address"][0].rpartition("://")[2].rpartition(":")[0]
        return next(container for container in self.containers(row["role"]) if address in container.addresses)

    def left(self) -> dict[str, list[str]]:
        """What there is of this project."""
        lists = {"containers": ("ps", "--all"), "volumes": ("volume", "ls"), "networks": ("network", "ls")}
        found = {kind: docker(*words, "--quiet", "--filter", self._mine).split() for kind, words in lists.items()}
        return {kind: names for kind, names in found.items() if names}

    @property
    def _mine(self) -> str:
        return f"label={PROJECT_LABEL}={self.project}"
