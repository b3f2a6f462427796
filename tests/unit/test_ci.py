"""`.ci/run` on a checkout of its own, whose `make test` says what it was given: what becomes of a container engine."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / ".ci" / "run"
# All that it would install, or find running here.
TOOLS = (
    "chromium", "npm", "aarch64-linux-gnu-g++", "qemu-aarch64", "clang++", "ip", "prometheus", "promtool",
)  # fmt: skip
# What these tests may run under hands to its children: a container engine, and make's own flags, of which its `-w`
# prints a line after the last one of `make test`.
INHERITED = {"DOCKER_HOST", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS"}
NO_DOCKER = "exit 1"
ENGINE = """
echo "$1" >> "$(dirname "$0")/asked"
case $1 in
    start) exit {code} ;;
    env) echo "export DOCKER_HOST=unix:///engine" ;;
esac
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / ".ci").mkdir(parents=True)
    for file in RUN.parent.iterdir():
        shutil.copy2(file, folder / ".ci")
    (folder / "Makefile").write_text("test:\n\t@echo tests with engine $$DOCKER_HOST\n")
    for tool in TOOLS:
        program(tmp_path / "bin" / tool, "exit 0")
    program(tmp_path / "bin" / "docker", NO_DOCKER)
    return folder


def run(checkout: Path) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in INHERITED}
    environ["PATH"] = f"{checkout.parent / 'bin'}:{environ['PATH']}"
    command = ["bash", str(checkout / ".ci" / "run")]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def docker_here(checkout: Path, code: int) -> Path:
    """A way to start an engine; the file that tells what it was asked for."""
    program(checkout.parent / "shared" / "docker" / "docker-here.sh", ENGINE.format(code=code))
    return checkout.parent / "shared" / "docker" / "asked"


def test_without_a_way_to_start_a_container_engine_the_tests_run_without_one(checkout: Path) -> None:
    done = run(checkout)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "tests with engine")


def test_an_engine_is_started_for_the_time_of_the_tests(checkout: Path) -> None:
    asked = docker_here(checkout, 0)
    done = run(checkout)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "tests with engine unix:///engine")
    assert asked.read_text().split() == ["start", "env", "stop"]


def test_an_engine_that_does_not_start_fails_the_run(checkout: Path) -> None:
    asked = docker_here(checkout, 7)
    done = run(checkout)
    assert done.returncode == 1
    assert "no container engine could be started" in done.stderr
    assert "tests with" not in done.stdout
    assert asked.read_text().split() == ["start", "stop"]
