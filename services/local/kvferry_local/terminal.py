"""What `kvferry up` shows: progress while the workers load, log lines of the children, one-line events."""

from __future__ import annotations

import sys
from typing import Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kvferry_local.process import Report

STAGE_WORDS: Final = {
    "start": "starting",
    "build": "building the native engine",
    "import": "importing",
    "load": "loading the model",
    "warm-up": "warming up",
    "ready": "ready",
}


class Terminal:
    """Progress as a live table on a terminal, as plain lines otherwise. Children's log lines pass through.

    Results (address, curl line) go to stdout; progress and logs to stderr.
    """

    def __init__(self, names: list[str], *, errors: TextIO | None = None) -> None:
        self._console = Console(file=errors or sys.stderr, highlight=False)
        self._stages = dict.fromkeys(names, "start")
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._width = max((len(name) for name in names), default=0)

    @staticmethod
    def attached() -> bool:
        """True if a person watches."""
        return sys.stderr.isatty()

    def begin(self) -> None:
        if self._live is not None:
            self._live.start()
            self._draw()

    def report(self, name: str, report: Report) -> None:
        stage = "ready" if report["event"] == "ready" else str(report.get("stage", ""))
        if self._stages.get(name) == stage:
            return
        self._stages[name] = stage
        if self._live is None:
            self.say(f"{name}: {STAGE_WORDS.get(stage, stage)}")
        else:
            self._draw()

    def child_line(self, name: str, line: str) -> None:
        """JSON log lines name their service themselves and stay parsable; others get the child's name."""
        self._console.print(Text(line if line.startswith("{") else f"{name:{self._width}} | {line}"), soft_wrap=True)

    def say(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)

    def result(self, text: str) -> None:
        """For the operator, or for a program that waits for it: on stdout, at once."""
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    def end(self) -> None:
        """Stop the live display. May be called twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> None:
        assert self._live is not None
        table = Table.grid(padding=(0, 2))
        for name, stage in self._stages.items():
            table.add_row(
                Text(name, "bold"), Text(STAGE_WORDS.get(stage, stage), "green" if stage == "ready" else "dim")
            )
        self._live.update(table, refresh=True)
