"""`kvferry doctor` and `kvferry bench` beside a real stack."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

from pages import parts, put, written
from stack import Stack


def test_the_doctor_finds_a_running_stack_healthy(stack: Stack) -> None:
    done = stack.command("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(done.stdout)
    found = {finding["check"]: finding for finding in document["findings"]}
    assert document["healthy"]
    assert set(found) >= {"model", "engine", "processor", "tcp transfer", "nats", "nats max_payload", "ports", "clock"}
    assert stack.url in found["ports"]["detail"]
    assert "3 peers" in found["clock"]["detail"]  # a gateway and two workers, of one machine
    secrets = (*(login.password for login in stack.facts.nats_logins.values()), stack.facts.data_key)
    assert not any(secret.get_secret_value() in done.stdout for secret in secrets)


def test_a_load_is_measured_on_a_running_stack(stack: Stack, tmp_path: Path) -> None:
    result, drawn = tmp_path / "out.json", tmp_path / "out.svg"
    (command,) = written("docs/when-not-to-disaggregate.md", "test_a_load_is_measured_on_a_running_stack")
    smaller = {"rate 2": "rate 4", "requests 200": "requests 6", "prompt-tokens 1500": "prompt-tokens 60"}
    line = put(command, smaller | {"output-tokens 200": "output-tokens 8", "apart.json": result})
    _, (program, *words) = parts(line)
    assert program == "kvferry"
    done = stack.command(*words, "--ignore-eos", "--svg", str(drawn))
    assert done.returncode == 0, done.stderr
    assert "6 of 6 requests whole" in done.stdout
    document = json.loads(result.read_text())
    assert document["model"] == "smollm2"
    for request in document["requests"]:
        assert 0 < len(request["arrivals"]) <= request["output_tokens"]
        assert 30 <= request["prompt_tokens"] <= 200
    ET.fromstring(drawn.read_text())
