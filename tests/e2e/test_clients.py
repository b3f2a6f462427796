"""Clients that people use, unchanged, each as a program of its own against the real stack."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from stack import Stack

CLIENTS = Path(__file__).parents[1] / "clients"
# A Python that has the clients; they may live in an environment of their own.
PYTHON = os.environ.get("KVFERRY_CLIENTS_PYTHON", sys.executable)
NPM_OPENAI = "openai@^6"
PROMPT = "Switch on the light in the hall, please."
PATIENCE_S = 240.0


def run(*command: str | Path, **env: str) -> Any:
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE_S, env={**os.environ, **env}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(stack: Stack, shown: dict[str, Any]) -> None:
    """Texts are what a plain request gets; what a schema demands is there, as the client has read it."""
    asked = {"model": "smollm2", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 48}
    with stack.http() as http:
        answer = http.post("/v1/chat/completions", json=asked).raise_for_status().json()
    said = answer["choices"][0]["message"]["content"]
    assert said
    for name in {"text", "streamed", "response"} & shown.keys():
        assert shown[name] == said, name
    lights = [shown[name] for name in ("structured", "by_schema") if name in shown]
    if "call" in shown:
        name, light = shown["call"]
        assert name == "SetLight"
        lights.append(light)
    assert lights
    for light in lights:
        assert set(light) == {"on", "room"}
        assert isinstance(light["on"], bool)
        assert light["room"] in ("kitchen", "hall")


@pytest.mark.parametrize(
    ("module", "program"),
    [
        ("langchain_openai", "langchain_client.py"),
        ("litellm", "litellm_client.py"),
        ("instructor", "instructor_client.py"),
    ],
)
def test_a_python_client_works_unchanged(stack: Stack, module: str, program: str) -> None:
    if sys.executable == PYTHON and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install -e '.[clients]'")
    check(stack, run(PYTHON, CLIENTS / program, stack.url, PROMPT, PYTHONPATH=""))


def test_the_npm_client_works_unchanged(stack: Stack, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    program = tmp_path / "openai_client.mjs"
    shutil.copy(CLIENTS / "openai_client.mjs", program)
    subprocess.run(
        (npm, "install", "--no-audit", "--no-fund", "--silent", NPM_OPENAI),
        cwd=tmp_path,
        check=True,
        timeout=PATIENCE_S,
    )
    check(stack, run("node", program, stack.url, PROMPT))
