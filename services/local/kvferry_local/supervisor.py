"""Runs the programs of a stack: the thin shell around `Supervision`.

Starts them, follows their reports and output, restarts what dies, announces deaths on the bus, stops them in
order. They are tethered (`kvferry.bus.tether`): none outlives the supervisor, not even one that is SIGKILLed.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence

from kvferry.log import get_logger
from kvferry.runtime import TaskSet, now
from kvferry_local.process import Process, Program, Report
from kvferry_local.supervision import (
    Action,
    Added,
    AllReady,
    Announce,
    Event,
    Exited,
    Failed,
    Finished,
    Gone,
    Identified,
    Ready,
    Restarting,
    Retire,
    Send,
    Start,
    StopAsked,
    Supervision,
    Tick,
)

log = get_logger(__name__)


class Audience(ABC):
    """Who hears what happens to the stack: the terminal and the bus."""

    @abstractmethod
    def report(self, name: str, report: Report) -> None:
        """A child's progress, or that it is ready."""

    @abstractmethod
    def line(self, name: str, line: str) -> None:
        """A line of a child's output."""

    @abstractmethod
    def restarting(self, event: Restarting) -> None: ...

    @abstractmethod
    async def announce(self, event: Announce) -> None:
        """Publish the exit. Neither waits for a bus that is down nor raises."""

    @abstractmethod
    async def all_ready(self) -> None: ...


class StackFailed(Exception):
    """A child ended before it was ready. `lines` are the last of its output."""

    def __init__(self, name: str, returncode: int, lines: Sequence[str]) -> None:
        super().__init__(f"{name} ended with {returncode} before it was ready")
        self.name = name
        self.returncode = returncode
        self.lines = tuple(lines)

    @property
    def reason(self) -> str:
        """One line: the child's own error if it gave one."""
        for line in reversed(self.lines):
            if line.startswith("kvferry: "):
                return f"{self.name}: {line.removeprefix('kvferry: ')}"
        last = next((line for line in reversed(self.lines) if line.strip()), "")
        return f"{self}{f': {last}' if last else ''}"


class Supervisor:
    """One stack. `run` once."""

    def __init__(self, programs: Sequence[Program], grace: float, audience: Audience) -> None:
        self._programs = {program.name: program for program in programs}
        self._supervision = Supervision([(program.name, program.role) for program in programs], grace)
        self._audience = audience
        self._processes: dict[str, Process] = {}  # that run
        self._last_lines: dict[str, tuple[str, ...]] = {}  # of those that ended
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._failure: StackFailed | None = None
        self._tasks = TaskSet(self._task_failed)

    def ask_stop(self) -> None:
        """Drain and stop; a second call kills."""
        log.info("stopping: gateways drain, then the workers; ask again to kill")
        self._events.put_nowait(StopAsked())

    @property
    def names(self) -> frozenset[str]:
        """Of all children, those that are still on their way out among them."""
        return frozenset(self._programs)

    def add(self, program: Program) -> None:
        """Run one more, under a name that no child has."""
        assert program.name not in self._programs
        self._programs[program.name] = program
        self._events.put_nowait(Added(program.name, program.role))

    def retire(self, name: str) -> None:
        """Let it drain and end; it is not started again."""
        self._events.put_nowait(Retire(name))

    def pids(self) -> dict[str, int]:
        """Of the processes that run."""
        return {name: process.pid for name, process in self._processes.items()}

    async def run(self) -> None:
        """Until every child is gone. Raises `StackFailed` if the stack could not start."""
        try:
            finished = await self._perform(self._supervision.begin())
            while not finished:
                event = await self._next_event()
                finished = await self._perform(self._supervision.handle(event, now()))
        finally:
            for process in list(self._processes.values()):
                await process.kill()
            await self._tasks.cancel()
        if self._failure is not None:
            raise self._failure

    async def _next_event(self) -> Event:
        deadline = self._supervision.deadline
        try:
            async with asyncio.timeout_at(deadline):
                return await self._events.get()
        except TimeoutError:
            return Tick()

    async def _perform(self, actions: list[Action]) -> bool:
        """True when nothing is left to supervise."""
        finished = False
        for action in actions:
            match action:
                case Start(name):
                    await self._start(self._programs[name])
                case Send(name, number):
                    if name in self._processes:
                        self._processes[name].send(number)
                case Announce():
                    await self._audience.announce(action)
                case Restarting():
                    self._audience.restarting(action)
                case AllReady():
                    self._tasks.spawn(self._audience.all_ready(), "all ready")
                case Gone(name):
                    del self._programs[name]
                case Failed(name, returncode):
                    self._failure = StackFailed(name, returncode, self._last_lines.get(name, ()))
                case Finished():
                    finished = True
        return finished

    async def _start(self, program: Program) -> None:
        process = await Process.start(program)
        self._processes[program.name] = process
        self._tasks.spawn(self._follow(process), f"follow {program.name}")
        log.debug("child started", child=program.name, pid=process.pid)

    async def _follow(self, process: Process) -> None:
        name = process.program.name
        returncode = await process.follow(
            lambda report: self._reported(name, report), lambda line: self._audience.line(name, line)
        )
        del self._processes[name]
        self._last_lines[name] = tuple(process.last_lines)
        self._events.put_nowait(Exited(name, returncode))

    def _reported(self, name: str, report: Report) -> None:
        if isinstance(incarnation := report.get("incarnation"), int):
            self._events.put_nowait(Identified(name, incarnation))
        self._audience.report(name, report)
        if report["event"] == "ready":
            self._events.put_nowait(Ready(name))

    def _task_failed(self, name: str, error: BaseException) -> None:
        log.error("supervisor task failed", task=name, error=repr(error))
