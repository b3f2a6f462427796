"""The control socket of a running stack, with real processes."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from stack_programs import program
from test_supervisor import Log

from kvferry.config.layers import load_settings
from kvferry.errors import SettingError
from kvferry.model_source import ModelSource
from kvferry_local.control import (
    MAX_ASK_BYTES,
    ControlRefused,
    Crew,
    ask_stack,
    control_socket,
    parse_scale,
    socket_path,
)
from kvferry_local.plan import Place, Plan, worker_name
from kvferry_local.process import Program
from kvferry_local.settings import UpSettings
from kvferry_local.supervision import Announce, Role
from kvferry_local.supervisor import Supervisor


class SmallPlan(Plan):
    """Workers that are small real programs."""

    def worker(self, role: Role, index: int, model: ModelSource) -> Program:
        return program(worker_name(role, index), role)


@asynccontextmanager
async def stack(folder: Path, *models: str) -> AsyncIterator[tuple[Path, Supervisor, Log]]:
    """One prefill and one decode worker of each model under a supervisor; the run file's path."""
    run_file = folder / "dev.json"
    settings = load_settings(UpSettings, config_file=None, environ={}, flags={})
    plan = SmallPlan(
        settings, Place(run_file, tuple(ModelSource(name, "/m") for name in models or ("m",)), (), (0, 1), "json")
    )
    log = Log()
    supervisor = Supervisor(plan.programs(), 10.0, log)
    running = asyncio.create_task(supervisor.run())
    async with control_socket(run_file, Crew(plan, supervisor)):
        await log.until("all ready")
        yield run_file, supervisor, log
    supervisor.ask_stop()
    await running


async def test_workers_are_added_and_the_youngest_drain(tmp_path: Path) -> None:
    async with stack(tmp_path) as (run_file, supervisor, log):
        assert await ask_stack(run_file, {}) == {"m": {"prefill": 1, "decode": 1}}
        assert await ask_stack(run_file, {"decode": 3, "prefill": 2}) == {"m": {"prefill": 2, "decode": 3}}
        for name in ("decode-1", "decode-2", "prefill-1"):
            await log.until((name, "ready"))
        assert set(supervisor.pids()) == {"prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2"}
        assert await ask_stack(run_file, {"decode": 1}) == {"m": {"prefill": 2, "decode": 1}}
        for name in ("decode-1", "decode-2"):
            await log.until(Announce(name, "decode", 1, "stopped"))
        assert supervisor.names == {"prefill-0", "prefill-1", "decode-0"}
        assert await ask_stack(run_file, {"decode": 2}) == {"m": {"prefill": 2, "decode": 2}}
        await log.until(("decode-1", "ready"), times=2)


async def test_a_model_s_workers_are_scaled_apart_from_another_s_and_without_a_name_all_are(tmp_path: Path) -> None:
    async with stack(tmp_path, "a", "b") as (run_file, supervisor, log):
        assert supervisor.names == {"prefill-0", "prefill-1", "decode-0", "decode-1"}
        both = {"a": {"prefill": 1, "decode": 1}, "b": {"prefill": 1, "decode": 1}}
        assert await ask_stack(run_file, {}) == both
        assert await ask_stack(run_file, {"decode": 2}, "b") == {"b": {"prefill": 1, "decode": 2}}
        await log.until(("decode-2", "ready"))
        assert await ask_stack(run_file, {"prefill": 0}, "a") == {"a": {"prefill": 0, "decode": 1}}
        await log.until(Announce("prefill-0", "prefill", 1, "stopped"))
        assert supervisor.names == {"prefill-1", "decode-0", "decode-1", "decode-2"}, "the other model's stays"
        assert await ask_stack(run_file, {"prefill": 1, "decode": 1}) == both
        await log.until(Announce("decode-2", "decode", 1, "stopped"))
        with pytest.raises(ControlRefused, match="there are: a, b"):
            await ask_stack(run_file, {}, "c")


@pytest.mark.parametrize("wanted", [{"decode": 0}, {"decode": 65}, {"prefill": -1}])
async def test_numbers_out_of_bounds_are_refused(tmp_path: Path, wanted: dict[Role, int]) -> None:
    async with stack(tmp_path) as (run_file, supervisor, _):
        with pytest.raises(ControlRefused, match="is not in"):
            await ask_stack(run_file, wanted)
        assert supervisor.names == {"prefill-0", "decode-0"}


async def test_only_the_owner_reaches_the_socket_and_garbage_is_answered(tmp_path: Path) -> None:
    async with stack(tmp_path) as (run_file, supervisor, _):
        path = socket_path(run_file)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        lines = (
            b"\n", b"[]\n", b'{"scale": 3}\n', b'{"scale": {"decode": true}}\n', b'{"scale": {}, "model": 3}\n',
            b'{"scale": {"gateway": 2}}\n',
            b"[" * 3000 + b"\n", b"x" * (2 * MAX_ASK_BYTES) + b"\n", b"\xff\n",
        )  # fmt: skip
        for line in lines:
            reader, writer = await asyncio.open_unix_connection(path)
            writer.write(line)
            assert b"error" in await reader.readline(), line
            writer.close()
        assert supervisor.names == {"prefill-0", "decode-0"}
    assert not path.exists()


async def test_a_stack_that_does_not_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is `kvferry up` running"):
        await ask_stack(tmp_path / "dev.json", {})


async def test_a_path_too_long_for_a_socket_leaves_a_stack_that_runs(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    async with stack(folder) as (run_file, supervisor, _):
        assert not socket_path(run_file).exists()
        assert supervisor.names == {"prefill-0", "decode-0"}


def test_what_is_no_number_of_a_role_is_refused() -> None:
    assert parse_scale(["prefill=2", "decode=3"]) == {"prefill": 2, "decode": 3}
    for word in ("decode", "decode=", "decode=x", "decode=-1", "gateway=2", "=2"):
        with pytest.raises(SettingError, match="ROLE=N"):
            parse_scale([word])
