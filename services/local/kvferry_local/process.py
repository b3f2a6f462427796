"""One supervised process: its start, its reports, its output lines, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from kvferry.bus.tether import tethered
from kvferry.config.environment import without_secrets
from kvferry.ready import MAX_REPORT_BYTES, READY_FD
from kvferry_local.supervision import Role

MAX_LINE_BYTES: Final = 64 * 1024
NUM_KEPT_LINES: Final = 20
READ_BYTES: Final = 64 * 1024
PIPE_GRACE_S: Final = 1.0  # for the last lines of a program that has ended


@dataclass(frozen=True, slots=True)
class Program:
    """What to run. `environ` is added to this process's environment without its secrets."""

    name: str
    role: Role
    command: tuple[str, ...]
    environ: dict[str, str] = field(default_factory=dict)


Report = dict[str, Any]


class Process:
    """A running program. Leads its own session, so that a terminal's Ctrl-C reaches the supervisor alone."""

    def __init__(
        self,
        program: Program,
        process: asyncio.subprocess.Process,
        reports: asyncio.StreamReader,
        transport: asyncio.ReadTransport,
    ) -> None:
        self.program = program
        self.last_lines: deque[str] = deque(maxlen=NUM_KEPT_LINES)  # of its output, for a failure's message
        self._process = process
        self._reports = reports
        self._transport = transport

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def start(cls, program: Program) -> Process:
        """Raises OSError. `follow` must be awaited afterwards: it closes what this opened."""
        read_end, write_end = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *tethered(*program.command),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**without_secrets(os.environ), **program.environ, READY_FD: str(write_end)},
                pass_fds=(write_end,),
                start_new_session=True,
            )
        except BaseException:
            os.close(read_end)
            raise
        finally:
            os.close(write_end)
        reports = asyncio.StreamReader(limit=MAX_REPORT_BYTES)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reports), os.fdopen(read_end, "rb", 0)
        )
        return cls(program, process, reports, transport)

    async def follow(self, on_report: Callable[[Report], None], on_line: Callable[[str], None]) -> int:
        """Hand on reports and output lines until the program has ended. Returns its return code."""
        listening = asyncio.gather(self._listen(on_report), self._read(on_line))
        try:
            returncode = await self._process.wait()
            # Its end closes both pipes, unless it gave them to a child of its own.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PIPE_GRACE_S):
                    await listening
        finally:
            listening.cancel()
            self._transport.close()
        return returncode

    async def _listen(self, on_report: Callable[[Report], None]) -> None:
        async for report in reports_of(self._reports):
            on_report(report)

    async def _read(self, on_line: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        async for line in lines(self._process.stdout):
            self.last_lines.append(line)
            on_line(line)

    def send(self, number: signal.Signals) -> None:
        """Without effect once it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.send(signal.SIGKILL)
        await self._process.wait()


async def lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """Text lines. One longer than `MAX_LINE_BYTES` is cut into several, so that memory stays bounded."""
    rest = b""
    while chunk := await stream.read(READ_BYTES):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace")
        if len(rest) > MAX_LINE_BYTES:
            yield rest.decode(errors="replace")
            rest = b""
    if rest:
        yield rest.decode(errors="replace")


async def reports_of(stream: asyncio.StreamReader) -> AsyncIterator[Report]:
    """What a child reports (`kvferry.ready`). A line that is no report is skipped: it is advice, not protocol."""
    async for line in lines(stream):
        try:
            report = json.loads(line)
        except ValueError:
            continue
        if isinstance(report, dict) and report.get("event") in ("progress", "ready"):
            yield report


async def outcome_of(words: Sequence[str], timeout: float) -> tuple[int, bytes, bytes]:
    """(return code, stdout, stderr) of a program that ends by itself.

    Raises OSError, `TimeoutError` once it is killed.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        async with asyncio.timeout(timeout):
            out, problem = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    return process.returncode or 0, out, problem
