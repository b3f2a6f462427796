"""The `kvferry` command without a stack: help, version, and errors of one line that name the setting."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from stack import kvferry

COMMANDS = [
    [], ["up"], ["gateway"], ["prefill"], ["decode"], ["rank"], ["chat"], ["status"], ["drain"], ["scale"],
    ["autoscale"], ["bench"], ["doctor"], ["credentials"],
    ["model"], ["model", "fetch"], ["model", "import"], ["model", "list"],
]  # fmt: skip


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """No run file, no settings of the caller."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("KVFERRY_")}
    return {**clean, "XDG_RUNTIME_DIR": str(tmp_path)}


def one_line(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("kvferry: ")
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_a_help_text(command: list[str]) -> None:
    done = kvferry(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: ")
    assert "--help" in done.stdout


def test_help_lists_the_commands_from_the_first_one_to_use() -> None:
    text = kvferry("--help").stdout
    listed = text.split("Commands:")[1]
    assert listed.split()[0] == "up"


def test_the_version_is_that_of_the_package() -> None:
    assert kvferry("--version").stdout == "kvferry 0.1.0\n"


def test_a_taken_port_is_named_before_a_model_is_loaded(environ: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        one_line(kvferry("up", "--port", port, environ=environ), 2, "--port", port, "taken")
        one_line(kvferry("up", environ={**environ, "KVFERRY_PORT": port}), 2, "--port", port)


def test_a_missing_model_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    one_line(kvferry("up", "--port", "0", "--model", "nosuch", environ=environ), 2, "--model", "nosuch")
    (tmp_path / "empty").mkdir()
    done = kvferry("up", "--port", "0", "--model", str(tmp_path / "empty"), environ=environ)
    one_line(done, 1, "config.json")


def test_an_unreachable_nats_server_is_named(environ: dict[str, str], model_dir: Path) -> None:
    done = kvferry(
        "up", "--port", "0", "--model", str(model_dir), environ={**environ, "KVFERRY_NATS_URL": "nats://127.0.0.1:9"}
    )
    one_line(done, 1, "KVFERRY_NATS_URL")


def test_ucx_where_it_is_not_installed_is_named(environ: dict[str, str]) -> None:
    program = "import sys; sys.modules['libucx'] = None; from kvferry_local.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "up", "--transport", "ucx"],
        capture_output=True, text=True, timeout=60, check=False, env=environ,
    )  # fmt: skip
    one_line(done, 2, "--transport", "tcp")


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--decode", "0"], "--decode"),
        (["--dtype", "int3"], "--dtype"),
        (["--config", "/no/such.yaml"], "--config"),
        (["--api-key-file", "/no/such.keys"], "--api-key-file"),
    ],
)
def test_a_wrong_setting_is_named(environ: dict[str, str], flags: list[str], name: str) -> None:
    one_line(kvferry("up", "--port", "0", *flags, environ=environ), 2, name)


@pytest.mark.parametrize("command", [["chat", "hi"], ["status"], ["drain", "decode-0"]])
def test_without_a_stack_its_clients_say_so(environ: dict[str, str], command: list[str]) -> None:
    one_line(kvferry(*command, environ=environ), 2, "kvferry up")


@pytest.mark.parametrize("service", ["gateway", "prefill", "decode"])
def test_a_service_without_its_stack_names_the_run_file(environ: dict[str, str], service: str) -> None:
    one_line(kvferry(service, "--join", environ=environ), 2, "--join")
