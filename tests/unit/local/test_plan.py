"""From the settings of `kvferry up` to command lines, ports and messages."""

from __future__ import annotations

import json
import re
import shlex
import socket
from pathlib import Path

import pytest

from kvferry.config import load_settings
from kvferry.errors import SettingError
from kvferry_local.plan import Place, programs, ready_message, share_of_cores
from kvferry_local.ports import base_url, claim
from kvferry_local.process import Program
from kvferry_local.settings import UpSettings


def settings(**flags: object) -> UpSettings:
    return load_settings(UpSettings, config_file=None, environ={}, flags=flags)


def planned(cores: tuple[int, ...] = (0, 1), ports: tuple[int, ...] = (8000,), **flags: object) -> dict[str, Program]:
    place = Place(Path("/run/dev.json"), Path("/models/m"), "m", ports, cores, "json")
    return {program.name: program for program in programs(settings(**flags), place)}


def flag(program: Program, name: str) -> str | None:
    words = program.command
    return words[words.index(name) + 1] if name in words else None


def test_one_prefill_one_decode_and_one_gateway_by_default() -> None:
    plan = planned()
    assert [(program.name, program.role) for program in plan.values()] == [
        ("prefill-0", "prefill"),
        ("decode-0", "decode"),
        ("gateway-0", "gateway"),
    ]
    for name, program in plan.items():
        assert f"kvferry_{program.role}" in program.command
        assert flag(program, "--name") == name
        assert flag(program, "--join") == "/run/dev.json"
        assert flag(program, "--served-model-name") == "m"
    assert flag(plan["gateway-0"], "--port") == "8000"
    assert flag(plan["decode-0"], "--max-model-len") is None


def test_the_single_worker_baseline_has_no_prefill_worker() -> None:
    assert set(planned(prefill=0, decode=1)) == {"decode-0", "gateway-0"}


def test_cores_are_shared_out_over_the_workers_and_every_worker_gets_one() -> None:
    plan = planned(cores=tuple(range(8)), prefill=2, decode=2)
    assert {flag(plan[name], "--threads") for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")} == {"2"}
    assert plan["decode-1"].environ["OMP_NUM_THREADS"] == "2"
    assert flag(planned(cores=(0,), prefill=2, decode=2)["decode-1"], "--threads") == "1"
    assert flag(planned(threads=3)["decode-0"], "--threads") == "3"
    assert flag(planned()["gateway-0"], "--threads") is None


def test_pinned_workers_do_not_overlap_while_there_are_enough_cores() -> None:
    plan = planned(cores=(2, 3, 6, 7), pin=True)
    assert flag(plan["prefill-0"], "--cpus") == "2,3"
    assert flag(plan["decode-0"], "--cpus") == "6,7"
    assert flag(planned()["decode-0"], "--cpus") is None
    assert share_of_cores((5,), 3, 2) == "5"


def test_settings_of_the_gateway_reach_the_gateways_alone() -> None:
    plan = planned(ports=(8000, 8001), gateways=2, api_key_file="keys", cors_origins="a,b")
    for index in range(2):
        gateway = plan[f"gateway-{index}"]
        assert (flag(gateway, "--api-key-file"), flag(gateway, "--cors-origins")) == ("keys", "a,b")
        assert flag(gateway, "--port") == str(8000 + index)
    assert flag(plan["decode-0"], "--api-key-file") is None


@pytest.mark.parametrize("bad", [{"decode": 0}, {"prefill": -1}, {"port": 65535, "gateways": 2}, {"dtype": "int8"}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        settings(**bad)


def test_no_secret_stands_on_a_command_line() -> None:
    plan = planned(nats_password="hush", data_key="ab" * 32)
    assert not any("hush" in word or "abab" in word for program in plan.values() for word in program.command)


def test_the_printed_line_is_a_curl_command_with_valid_json() -> None:
    text = ready_message("http://127.0.0.1:8000", "smollm2", 1, 1, 4.25)
    command = shlex.split(re.search(r"curl(.|\n)*?'\n\n", text)[0])  # type: ignore[index]
    assert command[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(command[command.index("-d") + 1])["model"] == "smollm2"
    assert "4.2 s" in text


def test_a_taken_port_is_refused_by_name_and_a_free_one_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SettingError, match=f"--port: {port} is taken"):
            claim("127.0.0.1", port, 1)
    assert claim("127.0.0.1", port, 1) == (port,)
    assert len(set(claim("127.0.0.1", 0, 3))) == 3


def test_a_host_that_is_not_ours_is_refused_by_name() -> None:
    with pytest.raises(SettingError, match="--host"):
        claim("192.0.2.1", 0, 1)
    with pytest.raises(SettingError, match="--host"):
        claim("no such host", 0, 1)


def test_addresses_are_shown_as_a_client_here_reaches_them() -> None:
    assert base_url("0.0.0.0", 80) == "http://127.0.0.1:80"
    assert base_url("::", 80) == "http://[::1]:80"
    assert base_url("10.0.0.1", 80) == "http://10.0.0.1:80"
