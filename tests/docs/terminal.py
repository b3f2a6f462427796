"""A shell into which a test types what a page tells its reader to type, and two machines for it to run on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from namespaces import two_networks

END: Final = "end-of-block"
TIMEOUT_S: Final = 240.0  # of one block, on a machine that does other things
STOP_TIMEOUT_S: Final = 120.0


class Terminal:
    """One bash without a terminal's echo and prompt. What its programs write is kept, both streams as one.

    A command that fails ends the shell, which fails the block.
    """

    def __init__(self, prefix: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            # A shell that inherits an ignored SIGINT can never trap it.
            [*prefix, "env", "--default-signal=INT", "bash", "--noprofile", "--norc", "-e"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=dict(environ),
            text=True,
            bufsize=1,
            start_new_session=True,
        )
        self.output = ""
        self._changed = threading.Condition()
        self._blocks = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def run(self, text: str) -> str:
        """Type it, and wait for its end. Returns what it wrote; raises AssertionError if it failed."""
        begin, end = self._type(text)
        self._wait(lambda: end in self.output, f"no end of:\n{text}")
        return self.output[begin : self.output.index(end)]

    def begin(self, text: str, shown: re.Pattern[str]) -> None:
        """Type what goes on, and wait until it has written what the page shows."""
        begin, end = self._type(text)
        seen = lambda: shown.search(self.output, begin) is not None  # noqa: E731
        self._wait(lambda: seen() or end in self.output, f"not seen: {shown.pattern}")
        assert seen(), f"it has ended without having shown {shown.pattern}:\n{self.output[begin:]}"

    def interrupt(self) -> None:
        """Ctrl-C to what runs here, and wait for its end."""
        self._signal(signal.SIGINT)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)

    def end(self) -> None:
        """SIGTERM to all that still runs here, behind the shell, too: it drains."""
        self._signal(signal.SIGTERM)

    def close(self) -> None:
        """Nothing is left that did not end by itself."""
        self._signal(signal.SIGKILL)
        self._process.wait(STOP_TIMEOUT_S)
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _type(self, text: str) -> tuple[int, str]:
        self._blocks += 1
        end = f"{END} {self._blocks}\n"
        begin = len(self.output)
        assert self._process.stdin is not None
        # In braces, so that the shell has read it all before its programs could read from the same pipe.
        self._process.stdin.write(f"{{\n{text}\n}} </dev/null\necho {end}")
        self._process.stdin.flush()
        return begin, end

    def _wait(self, come: Callable[[], bool], problem: str) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        with self._changed:
            while not come():
                ended = not self._reader.is_alive() or self._process.poll() is not None
                self._changed.wait(0.5)
                if (ended and not come()) or time.monotonic() > deadline:
                    raise AssertionError(f"{problem}\n--- what was written:\n{self.output[-6000:]}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self.output += line
                self._changed.notify_all()


class Machine:
    """A network of its own, and its terminals by name."""

    def __init__(self, prefix: Sequence[str], folder: Path, environ: Mapping[str, str]) -> None:
        self._prefix = prefix
        self._folder = folder
        self._environ = environ
        self.terminals: dict[str, Terminal] = {}

    def terminal(self, name: str) -> Terminal:
        if name not in self.terminals:
            self.terminals[name] = Terminal(self._prefix, self._folder, self._environ)
        return self.terminals[name]

    def stop(self, name: str) -> None:
        """Ctrl-C in a terminal, which is then not used again."""
        terminal = self.terminals.pop(name)
        try:
            terminal.interrupt()
        finally:
            terminal.close()


@contextlib.contextmanager
def two_machines(folder: Path, environ: Mapping[str, str]) -> Iterator[dict[str, Machine]]:
    """`a` and `b`, in the two networks of `namespaces`. They share a disk."""
    with two_networks(folder) as inside:
        machines = {name: Machine(prefix, folder, environ) for name, prefix in zip("ab", inside, strict=True)}
        try:
            yield machines
        finally:
            for machine in machines.values():
                for terminal in machine.terminals.values():
                    terminal.close()


def shown_pattern(text: str) -> re.Pattern[str]:
    """What an output block shows, read loosely: `…` is anything, also several lines where it stands alone; numbers
    and widths of gaps may differ; further lines may stand between those that are shown."""
    lines = []
    for line in text.splitlines():
        if line.strip() and line.strip() != "…":
            parts = [re.escape(part) for part in line.strip().split("…")]
            loose = r"[^\n]*?".join(parts)
            loose = re.sub(r"(?<![A-Za-z])\d+(\\\.\d+)?", r"[\\d.,]+", loose)
            lines.append(r"[ \t]*" + re.sub(r"(\\?\s)+", r"[ \\t]+", loose) + r"[^\n]*(?:\n|\Z)")
    return re.compile(r"(?:[^\n]*\n)*?".join(lines))
