"""From the settings of `kvferry up` to command lines, ports and messages."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from pathlib import Path

import pytest

from kvferry.config.layers import load_settings
from kvferry.errors import SettingError
from kvferry.model_source import ModelSource
from kvferry_local.plan import Place, Plan, curl_options, own_cores, ready_message, usable_cores
from kvferry_local.ports import base_url, claim
from kvferry_local.process import Program
from kvferry_local.settings import UpSettings
from kvferry_local.supervision import Role

MODELS = (ModelSource("m", "/models/m"), ModelSource("n/7B", "/models/n"))
ADDED: tuple[tuple[Role, int], ...] = (("decode", 1), ("prefill", 1), ("decode", 2))


def settings(**flags: object) -> UpSettings:
    return load_settings(UpSettings, config_file=None, environ={}, flags=flags)


def planned(cores: tuple[int, ...] = (0, 1), ports: tuple[int, ...] = (8000,), **flags: object) -> dict[str, Program]:
    place = Place(Path("/run/dev.json"), MODELS[:1], ports, cores, "json")
    return {program.name: program for program in Plan(settings(**flags), place).programs()}


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
        assert flag(program, "--model") == "m=/models/m"
        assert flag(program, "--served-model-name") == "m", "stronger than a variable of another name"
    assert flag(plan["gateway-0"], "--port") == "8000"
    assert flag(plan["decode-0"], "--max-model-len") is None


def test_the_single_worker_baseline_has_no_prefill_worker() -> None:
    assert set(planned(prefill=0, decode=1)) == {"decode-0", "gateway-0"}


def test_each_of_several_models_has_workers_of_its_own_and_every_gateway_serves_them_all() -> None:
    place = Place(Path("/run/dev.json"), MODELS, (8000,), tuple(range(8)), "json")
    plan = Plan(settings(prefill=1, decode=2, pin="auto"), place)
    programs = {program.name: program for program in plan.programs()}
    models = {name: flag(program, "--model") for name, program in programs.items() if program.role != "gateway"}
    assert models == {
        "prefill-0": "m=/models/m", "prefill-1": "n/7B=/models/n", "decode-0": "m=/models/m",
        "decode-1": "m=/models/m", "decode-2": "n/7B=/models/n", "decode-3": "n/7B=/models/n",
    }  # fmt: skip
    assert {flag(programs[name], "--cpus") for name in models} == set("012345")
    words = programs["gateway-0"].command
    assert [words[at + 1] for at, word in enumerate(words) if word == "--model"] == ["m=/models/m", "n/7B=/models/n"]
    text = ready_message("http://127.0.0.1:8000", ["m", "n/7B"], 1, 2, 4.25)
    assert "m, n/7B, 1 prefill + 2 decode each" in text
    assert '"model": "m"' in text


def test_cores_are_shared_out_over_the_workers_and_every_worker_gets_one() -> None:
    plan = planned(cores=tuple(range(8)), prefill=2, decode=2)
    assert {flag(plan[name], "--threads") for name in ("prefill-0", "prefill-1", "decode-0", "decode-1")} == {"2"}
    assert plan["decode-1"].environ["OMP_NUM_THREADS"] == "2"
    assert flag(planned(cores=(0,), prefill=2, decode=2)["decode-1"], "--threads") == "1"
    assert flag(planned(threads=3)["decode-0"], "--threads") == "3"
    assert flag(planned()["gateway-0"], "--threads") is None


def test_pinned_workers_do_not_overlap_while_there_are_enough_cores() -> None:
    plan = planned(cores=(2, 3, 6, 7), pin="auto")
    assert flag(plan["prefill-0"], "--cpus") == "2,3"
    assert flag(plan["decode-0"], "--cpus") == "6,7"
    assert flag(planned(pin="off")["decode-0"], "--cpus") is None


def test_nobody_is_pinned_where_the_cores_do_not_suffice_for_all() -> None:
    plan = planned(cores=(2, 3, 6), threads=2, pin="auto")
    assert [flag(plan[name], "--cpus") for name in ("prefill-0", "decode-0")] == [None, None]
    assert own_cores((0, 1, 2), 2, 2) is None  # one that was added later, say


def test_threads_of_one_physical_core_go_to_one_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two sockets of two cores, each of two threads, numbered as Linux does it: all first threads come first.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu % 2}\n")
        (topology / "core_id").write_text(f"{cpu % 4 // 2}\n")
    cores = usable_cores(tmp_path)
    assert cores == (0, 4, 2, 6, 1, 5, 3, 7)
    assert own_cores(cores, 0, 2) == "0,4"
    assert own_cores(cores, 4, 4) == "1,3,5,7"
    assert usable_cores(tmp_path / "nothing") == tuple(range(8))


def test_a_worker_that_is_added_is_like_the_others_and_has_cores_of_its_own() -> None:
    place = Place(Path("/run/dev.json"), MODELS[:1], (8000,), tuple(range(6)), "json")
    plan = Plan(settings(threads=1, pin="auto"), place)
    first = {program.name: program for program in plan.programs()}
    added = [plan.worker(role, index, MODELS[0]) for role, index in ADDED]
    seats = [flag(program, "--cpus") for program in (first["prefill-0"], first["decode-0"], *added)]
    assert len(set(seats)) == len(seats)

    def without_own(program: Program) -> list[str]:
        words = list(program.command)
        for name in ("--name", "--cpus"):
            del words[words.index(name) + 1]
        return words

    assert added[0].name == "decode-1"
    assert without_own(added[0]) == without_own(first["decode-0"])


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
    text = ready_message("http://127.0.0.1:8000", ["smollm2"], 1, 1, 4.25)
    command = shlex.split(re.search(r"curl(.|\n)*?'\n\n", text)[0])  # type: ignore[index]
    assert command[:3] == ["curl", "-N", "http://127.0.0.1:8000/v1/chat/completions"]
    assert json.loads(command[command.index("-d") + 1])["model"] == "smollm2"
    assert "4.2 s" in text


def test_the_line_to_paste_trusts_the_certificate_and_has_a_key_where_they_are_needed() -> None:
    made = settings(tls_cert="my certificate.pem", api_key_file="keys")
    text = ready_message("https://127.0.0.1:8000", ["m"], 1, 1, 1.0, curl_options(made))
    command = shlex.split(re.search(r"curl(.|\n)*?'\n\n", text)[0])  # type: ignore[index]
    assert command[command.index("--cacert") + 1] == "my certificate.pem"
    assert "authorization: Bearer $KVFERRY_API_KEY" in command
    assert curl_options(settings()) == ""


def test_the_key_of_the_certificate_reaches_the_gateways_and_its_password_nobody_else() -> None:
    plan = planned(tls_cert="c.pem", tls_key="k.pem", tls_key_password="hush")
    assert (flag(plan["gateway-0"], "--tls-cert"), flag(plan["gateway-0"], "--tls-key")) == ("c.pem", "k.pem")
    assert plan["gateway-0"].environ == {"KVFERRY_TLS_KEY_PASSWORD": "hush"}
    assert not any("hush" in str(program.environ) for name, program in plan.items() if name != "gateway-0")
    assert not any("hush" in word for program in plan.values() for word in program.command)


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


def test_each_rank_of_a_worker_has_threads_and_cores_and_each_role_its_degree() -> None:
    plan = planned(cores=tuple(range(8)), pin="auto", tensor_parallel_size=2, decode_tensor_parallel_size=6)
    assert [flag(plan[name], "--tensor-parallel-size") for name in ("prefill-0", "decode-0")] == ["2", "6"]
    assert [flag(plan[name], "--cpus") for name in ("prefill-0", "decode-0")] == ["0,1", "2,3,4,5,6,7"]
    assert flag(plan["decode-0"], "--threads") == "1"
    assert flag(planned()["decode-0"], "--tensor-parallel-size") is None
