"""The supervisor with real processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
from stack_programs import BROKEN, STUBBORN, program

from kvferry_local.process import MAX_LINE_BYTES, Process, Program, Report, lines
from kvferry_local.supervision import Announce, Restarting
from kvferry_local.supervisor import Audience, StackFailed, Supervisor


class Log(Audience):
    """Keeps what it hears; every change can be awaited."""

    def __init__(self) -> None:
        self.heard: list[object] = []
        self._changed = asyncio.Condition()

    def _hear(self, what: object) -> None:
        self.heard.append(what)
        asyncio.get_running_loop().create_task(self._wake())

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def until(self, what: object, times: int = 1) -> None:
        async with self._changed, asyncio.timeout(60):
            await self._changed.wait_for(lambda: self.heard.count(what) >= times)

    def report(self, name: str, report: Report) -> None:
        self._hear((name, report.get("stage", report["event"])))

    def line(self, name: str, line: str) -> None:
        self._hear((name, line))

    def restarting(self, event: Restarting) -> None:
        self._hear(event)

    async def announce(self, event: Announce) -> None:
        self._hear(event)

    async def all_ready(self) -> None:
        self._hear("all ready")


def is_running(pid: int) -> bool:
    try:
        # A zombie is not running, but it is not reaped either, when a grandparent must do so.
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


async def test_children_start_report_and_stop_in_order() -> None:
    log = Log()
    supervisor = Supervisor(
        [program("prefill-0", "prefill", incarnation=5), program("gateway-0", "gateway")], 10.0, log
    )
    running = asyncio.create_task(supervisor.run())
    await log.until("all ready")
    await log.until(("prefill-0", "a line of output"))
    pids = supervisor.pids()
    assert all(is_running(pid) for pid in pids.values())
    supervisor.ask_stop()
    await running
    assert not any(is_running(pid) for pid in pids.values())
    assert ("prefill-0", "load") in log.heard
    ends = [event for event in log.heard if isinstance(event, Announce)]
    assert [(end.name, end.cause) for end in ends] == [("gateway-0", "stopped"), ("prefill-0", "stopped")]
    assert ends[1].incarnation == 5


async def test_a_child_that_is_killed_is_announced_and_comes_back() -> None:
    log = Log()
    supervisor = Supervisor([program("decode-0", "decode", incarnation=3)], 10.0, log)
    running = asyncio.create_task(supervisor.run())
    await log.until("all ready")
    first = supervisor.pids()["decode-0"]
    os.kill(first, signal.SIGKILL)
    await log.until(("decode-0", "ready"), times=2)
    assert Announce("decode-0", "decode", 3, "killed") in log.heard
    assert Restarting("decode-0", "killed", -9, 0.0) in log.heard
    assert supervisor.pids()["decode-0"] != first
    supervisor.ask_stop()
    await running


async def test_a_child_that_does_not_drain_is_killed_after_its_grace() -> None:
    log = Log()
    supervisor = Supervisor([program("decode-0", "decode", STUBBORN)], 0.2, log)
    running = asyncio.create_task(supervisor.run())
    await log.until("all ready")
    pid = supervisor.pids()["decode-0"]
    supervisor.ask_stop()
    await running
    assert not is_running(pid)


async def test_a_stack_that_cannot_start_tells_the_childs_own_error() -> None:
    supervisor = Supervisor([program("decode-0", "decode", BROKEN), program("gateway-0", "gateway")], 5.0, Log())
    with pytest.raises(StackFailed) as caught:
        await supervisor.run()
    assert caught.value.reason == "decode-0: --dtype: no such thing"
    assert caught.value.returncode == 2
    assert supervisor.pids() == {}


async def test_a_failed_start_is_told_within_a_second_though_another_child_is_deaf_and_has_minutes_of_grace() -> None:
    loading = program("prefill-0", "prefill", STUBBORN.replace('report("ready", incarnation=9)', 'report("load")'))
    broken = BROKEN.replace("import sys", "import sys\nsys.stdin = open({gate!r})\nsys.stdin.read()")
    with tempfile.TemporaryDirectory() as folder:
        gate = str(Path(folder) / "gate")
        os.mkfifo(gate)
        log = Log()
        supervisor = Supervisor(
            [loading, program("decode-0", "decode", broken.replace("{gate!r}", repr(gate)))], 300.0, log
        )
        running = asyncio.create_task(supervisor.run())
        await log.until(("prefill-0", "load"))
        await asyncio.to_thread(Path(gate).write_text, "")  # decode-0 goes on, and fails
        async with asyncio.timeout(60):  # without the kill it would be the grace time
            with pytest.raises(StackFailed, match="decode-0"):
                await running
    assert supervisor.pids() == {}


async def test_a_program_that_does_not_exist_fails_the_start() -> None:
    supervisor = Supervisor([Program("decode-0", "decode", ("/no/such/program",))], 5.0, Log())
    with pytest.raises(StackFailed, match="decode-0"):
        await supervisor.run()


async def test_a_cancelled_supervisor_leaves_no_process() -> None:
    log = Log()
    supervisor = Supervisor([program("decode-0", "decode", STUBBORN)], 60.0, log)
    running = asyncio.create_task(supervisor.run())
    await log.until("all ready")
    pid = supervisor.pids()["decode-0"]
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not is_running(pid)


SUPERVISING = """
import asyncio, sys
from kvferry_local.process import Process, Program

async def main():
    process = await Process.start(Program("decode-0", "decode", (sys.executable, "-c", {child!r})))
    def heard(report):
        print(process.pid, flush=True)
    await process.follow(heard, lambda line: None)

asyncio.run(main())
"""


async def test_a_supervisor_killed_with_sigkill_takes_even_a_stubborn_child_along() -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", SUPERVISING.replace("{child!r}", repr(STUBBORN)), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = int(await parent.stdout.readline())
    watch = os.pidfd_open(child)
    try:
        assert is_running(child)
        ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(watch, ended.set)
        parent.kill()
        async with asyncio.timeout(60):
            await ended.wait()
        await parent.wait()
    finally:
        asyncio.get_running_loop().remove_reader(watch)
        os.close(watch)
    # Closes the pipe's transport, which nothing reads any more.
    assert await parent.stdout.read() == b""


async def test_children_lead_their_own_session() -> None:
    process = await Process.start(program("decode-0", "decode"))
    ready = asyncio.Event()
    following = asyncio.create_task(
        process.follow(lambda report: ready.set() if report["event"] == "ready" else None, lambda line: None)
    )
    async with asyncio.timeout(60):
        await ready.wait()
    assert os.getsid(process.pid) == process.pid
    process.send(signal.SIGTERM)
    assert await following == 0


async def test_output_lines_are_cut_so_that_memory_stays_bounded() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(b"short\n" + b"x" * (3 * MAX_LINE_BYTES) + b"\n\xff end")
    stream.feed_eof()
    found = [line async for line in lines(stream)]
    assert found[0] == "short"
    assert max(map(len, found)) <= 3 * MAX_LINE_BYTES
    assert "".join(found).count("x") == 3 * MAX_LINE_BYTES
    assert found[-1] == "\ufffd end"
