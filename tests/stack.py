"""A real `kvferry up` for end-to-end tests: its own run file, its own port, its processes countable."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from kvferry.runfile import RunFile

READY_TIMEOUT_S = 240.0
STOP_TIMEOUT_S = 120.0
MARK = "KVFERRY_TEST_STACK"  # in the environment of every process of one stack
KVFERRY = str(Path(sys.executable).with_name("kvferry"))


class Stack:
    """Start it, use it, stop it. `folder` holds the run file and the log."""

    def __init__(
        self, folder: Path, *flags: str, environ: Mapping[str, str] | None = None, program: str = KVFERRY
    ) -> None:
        self.run_file = folder / "run.json"
        self.log = folder / "up.log"
        self.output = ""
        self._mark = os.urandom(16).hex()
        self._flags = flags
        self._program = program
        self._environ = {**os.environ, "OMP_NUM_THREADS": "1", **(environ or {}), MARK: self._mark}
        self._process: subprocess.Popen[str] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> Stack:
        """Returns once the stack has said that it is ready; fails the test with the log otherwise."""
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [self._program, "up", "--port", "0", "--run-file", str(self.run_file), *self._flags],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environ,
                text=True,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        watchdog = threading.Timer(READY_TIMEOUT_S, self._process.kill)
        watchdog.start()
        try:
            for line in self._process.stdout:
                self.output += line
                if line.startswith("Ctrl-C"):
                    return self
        finally:
            watchdog.cancel()
        raise AssertionError(f"the stack ended with {self._process.wait()}:\n{self.log.read_text()[-4000:]}")

    @property
    def facts(self) -> RunFile:
        return RunFile.read(self.run_file)

    @property
    def url(self) -> str:
        return self.facts.gateways[0]

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def workers(self) -> list[dict[str, Any]]:
        """Rows of `/v1/cluster`."""
        with self.http() as http:
            return list(http.get("/v1/cluster").raise_for_status().json()["workers"])

    def worker(self, name: str) -> dict[str, Any] | None:
        return next((worker for worker in self.workers() if worker["name"] == name), None)

    def curl_command(self) -> str:
        """What the operator is told to paste."""
        found = re.search(r"curl(?:.|\n)*?'\n", self.output)
        assert found, self.output
        return found[0]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another kvferry command beside the stack."""
        return kvferry(*arguments, environ={**self._environ, "KVFERRY_RUN_FILE": str(self.run_file)})

    def processes(self) -> dict[int, str]:
        """Every living process of this stack, whoever its parent is by now."""
        return marked_processes(self._mark)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Send a signal to `kvferry up` alone, as a terminal would, and wait for its end. Returns its code."""
        assert self._process is not None
        self._process.send_signal(number)
        return self._join()

    def close(self) -> None:
        """For teardown: nothing is left, whatever the test did."""
        if self._process is not None:
            if self._process.poll() is None:
                self._process.kill()
            self._join()
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)

    def _join(self) -> int:
        assert self._process is not None
        assert self._process.stdout is not None
        code = self._process.wait(STOP_TIMEOUT_S)
        if not self._process.stdout.closed:
            self.output += self._process.stdout.read()
            self._process.stdout.close()
        return code


def marked_processes(mark: str) -> dict[int, str]:
    """Every living process with this value of MARK in its environment: pid to command line."""
    wanted = f"{MARK}={mark}".encode()
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue  # it ended, or is not ours
    return found


def kvferry(*arguments: str, environ: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run one command to its end."""
    return subprocess.run(
        [KVFERRY, *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=dict(environ) if environ is not None else None,
    )


def eventually(what: Callable[[], Any], seconds: float = 150.0) -> Any:
    """The first true value of `what`, for what other processes change without an event for us."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)
    return value
