"""What must be single or alive: the run file's owner, the embedded NATS server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
from nats_server import NatsServer

from kvferry.bus.nats import NatsBus
from kvferry.errors import SettingError
from kvferry.runtime import SystemRuntime
from kvferry_local.keeper import keep_running, sole_owner


def test_two_stacks_cannot_own_one_run_file(tmp_path: Path) -> None:
    run_file = tmp_path / "x" / "dev.json"
    with sole_owner(run_file):
        run_file.write_text("{}")
        with pytest.raises(SettingError, match="--run-file"), sole_owner(run_file):
            pass
        assert run_file.exists()
    assert not run_file.exists()
    with sole_owner(run_file):
        pass


def test_the_run_file_goes_with_a_stack_that_fails(tmp_path: Path) -> None:
    run_file = tmp_path / "dev.json"
    with contextlib.suppress(ZeroDivisionError), sole_owner(run_file):
        run_file.write_text("{}")
        raise ZeroDivisionError
    assert not run_file.exists()


@pytest.mark.usefixtures("no_leaks")
async def test_a_nats_server_that_dies_comes_back_on_its_port() -> None:
    nats = NatsServer()
    server = nats.embedded
    await server.start()
    keeper = asyncio.create_task(keep_running(server))
    bus = NatsBus(nats.settings("watcher"), SystemRuntime())
    lost, back = asyncio.Event(), asyncio.Event()
    try:
        await bus.start()
        bus.on_change(lambda connected: (back if connected else lost).set())
        first = server.pid
        os.kill(first, signal.SIGKILL)
        async with asyncio.timeout(60):
            await lost.wait()
            await back.wait()
        assert server.pid != first
    finally:
        await bus.close()
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        await server.stop()
