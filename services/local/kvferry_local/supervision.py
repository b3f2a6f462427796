"""What the supervisor decides: events and a clock value in, actions out. No I/O, no asyncio.

Exited before it was ever ready, while the stack starts  ->  Failed, everything is killed
Exited later, unasked                                    ->  Announce, then Start after a backoff
Added   ->  Start; such a child may fail as often as it likes without ending the stack
Retire  ->  SIGTERM, which a worker answers by draining; never SIGKILL; when it is gone, Gone
StopAsked   ->  SIGTERM to the gateways, when they are gone to decode, then to prefill; then Finished
StopAsked again, or a stage over its grace time          ->  SIGKILL

    starting ──ready──> ready ──exited──> backoff ──due──> starting
        ├───────────────┴──stop asked──> stopping ──exited──> stopped
        └──retire──> retiring ──exited──> (forgotten)
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

Cause = Literal["crashed", "killed", "stopped"]
Phase = Literal["starting", "ready", "backoff", "retiring", "stopping", "stopped"]
Role = Literal["gateway", "prefill", "decode"]

# Gateways drain first, because their streams need the workers.
STOP_ORDER: Final[tuple[Role, ...]] = ("gateway", "decode", "prefill")
STEADY_S: Final = 10.0  # ready for so long: an earlier death no longer counts
FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 15.0
# A signal that says "somebody outside wanted it gone"; every other one is the process's own fault.
OUTSIDE_SIGNALS: Final = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


# Events


@dataclass(frozen=True, slots=True)
class Identified:
    """A child told its incarnation."""

    name: str
    incarnation: int


@dataclass(frozen=True, slots=True)
class Ready:
    name: str


@dataclass(frozen=True, slots=True)
class Exited:
    """`returncode` as subprocess has it: negative for a signal."""

    name: str
    returncode: int


@dataclass(frozen=True, slots=True)
class Added:
    """One more child than the stack began with."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True)
class Retire:
    """One child is no longer wanted: it drains and ends."""

    name: str


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Ctrl-C or SIGTERM; the second one kills."""


@dataclass(frozen=True, slots=True)
class Tick:
    """`Supervision.deadline` has come."""


Event: TypeAlias = Identified | Ready | Exited | Added | Retire | StopAsked | Tick


# Actions


@dataclass(frozen=True, slots=True)
class Start:
    name: str


@dataclass(frozen=True, slots=True)
class Send:
    name: str
    signal: signal.Signals


@dataclass(frozen=True, slots=True)
class Announce:
    """Tell the bus that this incarnation is gone, so that nobody waits for its silence."""

    name: str
    role: Role
    incarnation: int
    cause: Cause


@dataclass(frozen=True, slots=True)
class Restarting:
    """For the operator: the child died and is started again in `delay` seconds."""

    name: str
    cause: Cause
    returncode: int
    delay: float


@dataclass(frozen=True, slots=True)
class AllReady:
    """Every child has been ready once. Comes once."""


@dataclass(frozen=True, slots=True)
class Gone:
    """A child that was retired has ended, or one that was added comes too late: its name is free."""

    name: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The stack cannot start because of this child."""

    name: str
    returncode: int


@dataclass(frozen=True, slots=True)
class Finished:
    """No child is left."""


Action: TypeAlias = Start | Send | Announce | Restarting | AllReady | Gone | Failed | Finished


@dataclass(slots=True)
class _Child:
    name: str
    role: Role
    phase: Phase = "starting"
    incarnation: int | None = None
    ready_since: float | None = None
    due: float | None = None  # end of the backoff
    num_quick_deaths: int = 0  # in a row
    was_ready: bool = False
    essential: bool = True  # one that cannot start ends the stack


def cause_of(returncode: int, asked: bool) -> Cause:
    """Why a process ended, as far as its parent can tell."""
    if asked or returncode == 0:
        return "stopped"
    return "killed" if returncode < 0 and -returncode in OUTSIDE_SIGNALS else "crashed"


class Supervision:
    """The state of one stack. `children` are (name, role) pairs in start order."""

    def __init__(self, children: list[tuple[str, Role]], grace: float) -> None:
        self._children = {name: _Child(name, role) for name, role in children}
        self._grace = grace
        self._all_ready = False
        self._num_stops = 0
        self._kill_at: float | None = None

    @property
    def deadline(self) -> float | None:
        """When a `Tick` is wanted next."""
        due = [child.due for child in self._children.values() if child.due is not None]
        if self._kill_at is not None:
            due.append(self._kill_at)
        return min(due, default=None)

    def phases(self) -> dict[str, Phase]:
        return {name: child.phase for name, child in self._children.items()}

    def begin(self) -> list[Action]:
        """The first actions."""
        return [Start(name) for name in self._children]

    def handle(self, event: Event, now: float) -> list[Action]:
        match event:
            case Identified(name, incarnation):
                self._children[name].incarnation = incarnation
                return []
            case Ready(name):
                return self._ready(self._children[name], now)
            case Exited(name, returncode):
                return list(self._exited(self._children[name], returncode, now))
            case Added(name, role):
                return self._add(name, role)
            case Retire(name):
                return list(self._retire(name))
            case StopAsked():
                return list(self._stop(now))
            case Tick():
                return list(self._tick(now))

    def _ready(self, child: _Child, now: float) -> list[Action]:
        if child.phase != "starting":
            return []
        child.phase, child.ready_since, child.was_ready = "ready", now, True
        return list(self._completed())

    def _completed(self) -> Iterator[Action]:
        """After a child has become ready, or is no longer waited for."""
        if not self._all_ready and all(child.was_ready for child in self._children.values() if child.essential):
            self._all_ready = True
            yield AllReady()

    def _add(self, name: str, role: Role) -> list[Action]:
        assert name not in self._children, "the name of a child that was not Gone was given again"
        if self._num_stops:
            return [Gone(name)]
        self._children[name] = _Child(name, role, essential=False)
        return [Start(name)]

    def _retire(self, name: str) -> Iterator[Action]:
        child = self._children.get(name)
        if child is None or self._num_stops or child.phase == "retiring":
            return
        if child.phase == "backoff":  # nothing runs
            yield from self._forget(child)
        else:
            child.phase = "retiring"
            yield Send(name, signal.SIGTERM)

    def _forget(self, child: _Child) -> Iterator[Action]:
        del self._children[child.name]
        yield Gone(child.name)
        yield from self._completed()

    def _exited(self, child: _Child, returncode: int, now: float) -> Iterator[Action]:
        cause = cause_of(returncode, asked=child.phase in ("stopping", "retiring"))
        if child.incarnation is not None:
            yield Announce(child.name, child.role, child.incarnation, cause)
        if self._num_stops:
            child.phase = "stopped"
            yield from self._next_stage(now)
            return
        if child.phase == "retiring":
            yield from self._forget(child)
            return
        if child.essential and not child.was_ready and cause != "killed":
            child.phase = "stopped"
            yield Failed(child.name, returncode)
            yield from self._abandon(now)
            return
        steady = child.ready_since is not None and now - child.ready_since >= STEADY_S
        deaths = 0 if steady else child.num_quick_deaths
        delay = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** (deaths - 1)) if deaths else 0.0
        child.num_quick_deaths = deaths + 1
        child.incarnation = child.ready_since = None
        yield Restarting(child.name, cause, returncode, delay)
        if delay:
            child.phase, child.due = "backoff", now + delay
        else:
            child.phase = "starting"
            yield Start(child.name)

    def _stop(self, now: float) -> Iterator[Action]:
        self._num_stops += 1
        if self._num_stops > 1:
            yield from self._kill_all()
            return
        self._leave_backoff()
        yield from self._next_stage(now)

    def _abandon(self, now: float) -> Iterator[Action]:
        """The start has failed: nobody was told of this stack, and a child that loads a model hears no SIGTERM."""
        self._num_stops += 1
        self._leave_backoff()
        yield from self._kill_all()
        yield from self._next_stage(now)

    def _leave_backoff(self) -> None:
        for child in self._children.values():
            if child.phase == "backoff":  # nothing runs
                child.phase, child.due = "stopped", None

    def _next_stage(self, now: float) -> Iterator[Action]:
        """SIGTERM to the next role that still runs, once the one before is gone."""
        left = [child for child in self._children.values() if child.phase != "stopped"]
        if not left:
            self._kill_at = None
            yield Finished()
            return
        role = next(role for role in STOP_ORDER if any(child.role == role for child in left))
        stage = [child for child in left if child.role == role]
        if any(child.phase == "stopping" for child in stage):
            return
        self._kill_at = now + self._grace
        for child in stage:
            child.phase = "stopping"
            yield Send(child.name, signal.SIGTERM)

    def _kill_all(self) -> Iterator[Action]:
        self._kill_at = None
        for child in self._children.values():
            if child.phase != "stopped":
                child.phase = "stopping"
                yield Send(child.name, signal.SIGKILL)

    def _tick(self, now: float) -> Iterator[Action]:
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            for child in self._children.values():
                if child.phase == "stopping":
                    yield Send(child.name, signal.SIGKILL)
        for child in self._children.values():
            if child.due is not None and now >= child.due:
                child.phase, child.due = "starting", None
                yield Start(child.name)
