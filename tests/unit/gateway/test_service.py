"""The gateway as a process: real NATS, real signals, one-line errors."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from nats_server import NatsServer
from scripted_worker import MODEL, completion, write_model

pytestmark = pytest.mark.usefixtures("no_leaks")


@asynccontextmanager
async def process(nats: NatsServer, *flags: str, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    variables = {
        "KVFERRY_NATS_URL": nats.embedded.url,
        "KVFERRY_NATS_USER": nats.user,
        "KVFERRY_NATS_PASSWORD": nats.password,
    }
    running = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "kvferry_gateway", *flags,
        env=os.environ | variables | environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield running
    finally:
        if running.returncode is None:
            running.kill()
        await running.communicate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


async def refusal(running: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(60):
        _, errors = await running.communicate()
    return running.returncode, errors.decode()


async def test_it_serves_until_sigterm_and_then_ends_well(nats: NatsServer, tmp_path: Path) -> None:
    write_model(tmp_path / MODEL)
    port = free_port()
    async with process(nats, "--model", str(tmp_path / MODEL), "--port", str(port)) as running:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            async with asyncio.timeout(60):
                while True:
                    try:
                        health = await client.get("/health")
                        break
                    except httpx.TransportError:
                        await asyncio.sleep(0.05)
            assert health.status_code == 200
            assert (await client.get("/v1/models")).json()["data"][0]["id"] == MODEL
            assert (await client.post("/v1/completions", json=completion())).status_code == 503
        running.send_signal(signal.SIGTERM)
        code, errors = await refusal(running)
        assert code == 0, errors
        assert "Traceback" not in errors
        assert "draining" in errors


async def test_recommended_sampling_that_is_not_applied_is_logged_once_at_the_start(
    nats: NatsServer, tmp_path: Path
) -> None:
    directory = tmp_path / MODEL
    write_model(directory)
    (directory / "generation_config.json").write_text('{"temperature": 0.5, "typical_p": 0.9}')
    async with process(nats, "--model", str(directory), "--port", "0", "--log-format", "json") as running:
        assert running.stderr is not None
        lines: list[str] = []
        async with asyncio.timeout(60):
            while not lines or '"ready"' not in lines[-1]:
                lines.append((await running.stderr.readline()).decode())
        running.send_signal(signal.SIGTERM)
        code, errors = await refusal(running)
    assert code == 0, errors
    told = [line for line in (*lines, *errors.splitlines()) if "generation_config.json" in line]
    assert len(told) == 1
    assert "typical_p" in told[0]
    assert "temperature" not in told[0]


async def test_wrong_settings_stop_the_start_in_one_line_that_names_them(nats: NatsServer, tmp_path: Path) -> None:
    write_model(tmp_path / MODEL)
    model = ("--model", str(tmp_path / MODEL))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = [
            ((), 2, "--model"),
            (("--model", "/nonexistent"), 1, "/nonexistent"),
            ((*model, "--port", port), 2, "--port"),
            ((*model, "--port", "0", "--api-key-file", "/nonexistent"), 2, "--api-key-file"),
            ((*model, "--port", "0", "--nats-url", f"nats://127.0.0.1:{free_port()}"), 1, "KVFERRY_NATS_URL"),
        ]
        for flags, expected, named in cases:
            async with process(nats, *flags) as running:
                code, errors = await refusal(running)
            last = errors.strip().splitlines()[-1]
            assert (code, named in last, "Traceback" in errors) == (expected, True, False), errors
