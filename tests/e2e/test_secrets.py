"""A real stack with known secrets, all of its planes that can be encrypted encrypted: the secrets turn up nowhere.

NATS behind TLS with a user for each role, a gateway behind TLS and API keys, a data key of the operator's own;
everything logs at debug. A worker is killed, keys are guessed, a connection is refused. Then every place that others
can read is searched.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import stat
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx
import pytest
from certificates import Authority
from pages import parts, put, written
from stack import Stack, kvferry

from kvferry.bus.rights import users_of
from kvferry.bus.server import EmbeddedNats
from kvferry.runtime import SystemRuntime
from kvferry_local.credentials import ROLES, write_credentials
from kvferry_local.trust import trust

API_KEY: Final = "sk-of-the-client-4f1d8c"
KEY: Final = {"authorization": f"Bearer {API_KEY}"}
GUESSED_KEY: Final = "sk-guessed-77aa10"
TLS_PASSWORD: Final = "opens-the-gateways-key-c2"
DATA_KEY: Final = "5e" * 32
PROMPT: Final = "A prompt that nobody else would write: xylophones of Ulan Bator."
PATIENCE_S: Final = 120.0


@dataclass
class Place:
    """One running stack, and all that was put into it."""

    stack: Stack
    http: httpx.AsyncClient
    environ: dict[str, str]
    secrets: dict[str, str]
    nats_url: str
    chat: list[str]  # the page's command from elsewhere, which has no run file

    async def workers(self) -> dict[str, dict[str, object]]:
        return {row["name"]: row for row in (await self.http.get("/v1/cluster", headers=KEY)).json()["workers"]}


@pytest.fixture
async def place(flags: tuple[str, ...], tmp_path: Path) -> AsyncIterator[Place]:
    authority = Authority(tmp_path / "certificates")
    nats, gateway = authority.sign("nats"), authority.sign("gateway", password=TLS_PASSWORD)
    keys = tmp_path / "keys"
    keys.write_text(f"{API_KEY} requests_per_minute=1000\n")
    keys.chmod(0o600)
    credentials = tmp_path / "credentials"
    write_credentials(credentials, "prod", SystemRuntime())
    passwords = {role: (credentials / f"nats-password-{role}").read_text() for role in ROLES}
    tls = {"cert_file": str(nats.certificate), "key_file": str(nats.key)}
    server = EmbeddedNats(users_of("prod", passwords), options={"tls": tls})
    await server.start()
    joining, serving, chat = written("docs/security.md", "place")
    host_and_port = server.url.partition("://")[2]
    own = {"nats.example:4222": host_and_port, "/etc/kvferry": credentials}
    files = {"chain.pem": gateway.certificate, "key.pem": gateway.key}
    page = [parts(put(joining, own))[1], parts(put(serving, files))[1]]
    assert [words[:2] for words in page] == [["kvferry", "up"]] * 2  # of one stack, whose flags add up
    environ = {
        "KVFERRY_NATS_TLS_CA": str(authority.certificate),
        "KVFERRY_DATA_KEY": DATA_KEY,
        "KVFERRY_TLS_KEY_PASSWORD": TLS_PASSWORD,
        "KVFERRY_API_KEY": API_KEY,  # a client's, set in the same shell
    }
    up = [*page[0][2:], *page[1][2:], "--api-key-file", str(keys), "--log-level", "debug"]
    stack = Stack(tmp_path, *flags, *up, environ=environ)
    secrets = {
        **{f"NATS password of {role}": password for role, password in passwords.items()},
        "data key": DATA_KEY, "API key": API_KEY, "guessed key": GUESSED_KEY,
        "password of the TLS key": TLS_PASSWORD, "prompt": "xylophones of Ulan Bator",
    }  # fmt: skip
    try:
        await asyncio.to_thread(stack.start)
        right = trust(stack.url, authority.certificate)
        _, asking = parts(put(chat, {"https://llm.example": stack.url, "authority.pem": authority.certificate}))
        async with httpx.AsyncClient(base_url=stack.url, verify=right, timeout=PATIENCE_S, trust_env=False) as http:
            yield Place(stack, http, environ, secrets, f"tls://{host_and_port}", asking)
    finally:
        await asyncio.to_thread(stack.close)
        await server.stop()


async def test_no_secret_is_in_a_log_a_command_line_an_environment_or_an_answer(place: Place) -> None:
    stack, http = place.stack, place.http
    assert stack.url.startswith("https://")
    pasted = await asyncio.to_thread(paste, stack.curl_command(), place.environ)
    assert "data: [DONE]" in pasted.stdout
    shown = {"what the operator sees": stack.output}
    shown |= await exercised(place)
    for pid, command in stack.processes().items():
        shown[f"command line of {pid}"] = command
        if pid != stack.pid:
            shown[f"environment of {pid} ({command})"] = environment(pid, without="kvferry_gateway" in command)
    for path in ("/v1/cluster", "/metrics", "/health", "/ready", "/openapi.json", "/v1/models", "/console/state"):
        answer = await http.get(path, headers=KEY)
        assert answer.status_code == 200, path
        shown[path] = answer.text
    for name, row in (await place.workers()).items():
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{row['debug_port']}", trust_env=False) as debug:
            for path in ("/metrics", "/debug/blocks", "/debug/digests"):
                shown[f"{name}{path}"] = (await debug.get(path)).text
    assert await asyncio.to_thread(stack.stop) == 0
    shown["the log"] = log = stack.log.read_text()
    found = [(name, where) for where, text in shown.items() for name, secret in place.secrets.items() if secret in text]
    assert found == []
    assert place.nats_url in "".join(shown.values()), "what is no secret is found"
    assert '"level": "debug"' in log
    assert "ermissions violation" not in log.lower()


def paste(line: str, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **environ}
    return subprocess.run(["sh", "-c", line], env=environ, capture_output=True, text=True, timeout=120, check=True)


def environment(pid: int, *, without: bool) -> str:
    """`without`: the password of its TLS key, which a gateway gets this way, and nobody else does."""
    text = Path(f"/proc/{pid}/environ").read_bytes().decode()
    assert (f"KVFERRY_TLS_KEY_PASSWORD={TLS_PASSWORD}" in text) == without
    return text.replace(TLS_PASSWORD, "") if without else text


async def exercised(place: Place) -> dict[str, str]:
    """Use the stack in all ways that have to do with a secret, and in wrong ones. What its commands and answers say."""
    stack, http = place.stack, place.http
    told = {}
    ask = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    answer = await http.post("/v1/completions", json=ask | {"max_tokens": 4}, headers=KEY)
    assert answer.status_code == 200, answer.text
    for refused in ({}, {"authorization": f"Bearer {GUESSED_KEY}"}):
        answer = await http.post("/v1/completions", json=ask, headers=refused)
        assert answer.status_code == 401
        told[f"401 {refused != {}}"] = answer.text
    told["400"] = (await http.post("/v1/completions", json=ask | {"n": "two"}, headers=KEY)).text
    # A worker dies under a stream, and its successor joins with the same secrets.
    pid = (await place.workers())["decode-0"]["pid"]
    async with http.stream("POST", "/v1/completions", json=ask | {"stream": True}, headers=KEY) as response:
        lines = response.aiter_lines()
        await anext(lines)
        os.kill(int(str(pid)), signal.SIGKILL)
        rest = [line async for line in lines]
    assert "data: [DONE]" in rest
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        async with httpx.AsyncClient(trust_env=False) as stranger:
            await stranger.get(f"{stack.url}/health")
    for command in (("chat", "--max-tokens", "4", "Hello"), ("status",), ("doctor", "--json"), ("drain", "decode-9")):
        done = await asyncio.to_thread(stack.command, *command)
        assert done.returncode == (2 if command[0] == "drain" else 0), done.stderr + done.stdout
        told[" ".join(command)] = done.stdout + done.stderr
    environ = {**os.environ, **place.environ}
    elsewhere = environ | {"KVFERRY_RUN_FILE": str(stack.run_file.with_name("none.json"))}
    program, *words = place.chat
    assert program == "kvferry"
    done = await asyncio.to_thread(lambda: kvferry(*words, environ=elsewhere))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    told["a chat from elsewhere"] = done.stdout + done.stderr
    flag = words.index("--tls-ca")
    done = await asyncio.to_thread(lambda: kvferry(*words[:flag], *words[flag + 2 :], environ=elsewhere))
    assert (done.returncode, "ertificate" in done.stderr) == (1, True), done.stderr + done.stdout
    wrong = environ | {"KVFERRY_RUN_FILE": str(stack.run_file), "KVFERRY_API_KEY": GUESSED_KEY}
    done = await asyncio.to_thread(lambda: kvferry("chat", "Hello", environ=wrong))
    assert done.returncode == 1
    told["a guessed key"] = done.stdout + done.stderr
    # The one place where they are, and whose it is.
    status = stack.run_file.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o600, os.getuid())
    facts = json.loads(stack.run_file.read_text())
    assert facts["data_key"] == DATA_KEY
    assert {role: login["password"] for role, login in facts["nats_logins"].items()} == {
        role: place.secrets[f"NATS password of {role}"] for role in ROLES
    }
    return told
