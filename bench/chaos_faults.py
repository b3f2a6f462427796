"""The faults: each is aimed at a phase of a live request, and says afterwards whom it struck."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from bench.books import Row
from bench.chaos_cases import Case
from bench.chaos_clients import Clients
from bench.chaos_fleet import Fleet, Phase, Place
from bench.contention import Contention
from bench.tap import Heard
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import ServerError

Kind = Literal["kill", "freeze", "terminate", "kill gateway", "restart nats", "reset"]
AIM_S: Final = 12.0  # until a phase must have been seen
BAIT_S: Final = 3.0  # until more requests are sent to bring it about
AIM_POLL_S: Final = 0.005
FREEZE_S: Final = 3.0
OUTAGE_S: Final = 2.0  # after which every process is heard of again, or known to be silent
GRANTED_S: Final = 2.0  # after a fault: the bound's own time, over which the machine's waits are counted
WHOLE_S: Final = 120.0  # until what died is back
CALM_S: Final = 2.5  # between two faults, the stack being whole; most requests that one has struck end meanwhile
FREED_LIMIT_S: Final = 15.0  # until the watch for a dead gateway's blocks gives up
NUM_BAITS: Final = 4  # long prompts at once: one is computed, others queue behind it


@dataclass(frozen=True, slots=True)
class Aim:
    kind: Kind
    role: str = ""  # of workers
    phase: Phase | None = None


# Over and over. The first eight make up the shortest run that has seen every phase, and every kind of process die.
PLAN: Final = (
    Aim("kill", "decode", "running"),
    Aim("kill", "prefill", "queued"),
    Aim("kill gateway"),
    Aim("kill", "decode", "fetching"),
    Aim("freeze", "decode", "running"),
    Aim("kill", "prefill", "held"),
    Aim("restart nats"),
    Aim("kill", "prefill", "computing"),
    Aim("reset"),
    Aim("kill", "decode", "running"),
    Aim("terminate", "decode", "running"),
    Aim("kill", "prefill", "queued"),
    Aim("freeze", "prefill", "computing"),
    Aim("kill", "decode", "fetching"),
    Aim("terminate", "prefill", "computing"),
    Aim("kill", "prefill", "held"),
)


@dataclass(slots=True)
class Fault:
    """One that happened. Times are of `blocking_clock`."""

    kind: Kind
    victim: str
    moment: float
    places: dict[str, Place] = field(default_factory=dict)  # of requests on the victim, just before
    clients: list[str] = field(default_factory=list)  # whose gateway the victim was
    freed_s: float | None = None  # after a gateway's death
    granted_s: float = 0.0  # what the busy machine adds to a bound on it

    @property
    def is_kill(self) -> bool:
        return self.kind in ("kill", "kill gateway")

    def struck(self, requests: dict[str, Heard]) -> dict[str, Place]:
        """Those that had to be placed again."""
        return {label: place for label, place in self.places.items() if max(requests[label].attempts) > place.attempt}

    def new_pair_s(self, requests: dict[str, Heard]) -> list[float]:
        """For each of them, seconds until a later attempt was accepted, as far as the bus was heard."""
        found = []
        for label, place in self.struck(requests).items():
            later = [a.accepted_at for number, a in requests[label].attempts.items() if number > place.attempt]
            moments = [moment for moment in later if moment is not None and moment > self.moment]
            if moments:
                found.append(min(moments) - self.moment)
        return found


class Faults:
    """Injects one fault after the other, each into a stack that is whole."""

    def __init__(self, fleet: Fleet, clients: Clients, baits: Sequence[Case], contention: Contention) -> None:
        self.happened: list[Fault] = []
        self.missed: list[Aim] = []  # whose phase was not seen in time
        self._fleet = fleet
        self._clients = clients
        self._baits: Iterator[Case] = itertools.cycle(baits)
        self._contention = contention

    async def run(self, seconds: float) -> None:
        """Ends with the stack whole again."""
        deadline = blocking_clock() + seconds
        fault: Fault | None = None
        for aim in itertools.cycle(PLAN):
            rows = await self._fleet.whole(WHOLE_S)
            if fault is not None:
                fault.granted_s = self._contention.granted(fault.moment, fault.freed_s or GRANTED_S)
            self._contention.follow(self._fleet.pids())
            await asyncio.sleep(CALM_S)
            if blocking_clock() >= deadline:
                return
            fault = await self._inject(aim, rows)
            if fault is None:
                self.missed.append(aim)
            else:
                self.happened.append(fault)

    async def _inject(self, aim: Aim, rows: list[Row]) -> Fault | None:
        match aim.kind:
            case "reset":
                return self._reset()
            case "restart nats":
                fault = self._kill("restart nats", "nats-server")
                await asyncio.sleep(OUTAGE_S)
                return fault
            case "kill gateway":
                return await self._kill_gateway()
        row, places = await self._in_phase(aim, [row for row in rows if row["role"] == aim.role])
        if row is None:
            return None
        number = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "terminate": signal.SIGTERM}[aim.kind]
        os.kill(row["pid"], number)
        fault = Fault(aim.kind, row["name"], blocking_clock(), places)
        if aim.kind == "freeze":
            await asyncio.sleep(FREEZE_S)
            os.kill(row["pid"], signal.SIGCONT)
        else:
            self._fleet.ended.add(row["incarnation"])
        return fault

    async def _in_phase(self, aim: Aim, rows: list[Row]) -> tuple[Row | None, dict[str, Place]]:
        """Look at the workers of a role until one of them has a live request in the phase."""
        began = baited = blocking_clock()
        if aim.phase != "running":
            self._bait()
        while (now := blocking_clock()) < began + AIM_S:
            if now >= baited + BAIT_S:
                self._bait()
                baited = now
            for row in rows:
                try:
                    places = await self._fleet.places(row, self._clients.live)
                except (OSError, ServerError, TimeoutError, asyncio.IncompleteReadError):
                    continue
                if any(place.phase == aim.phase for place in places.values()):
                    return row, places
            await asyncio.sleep(AIM_POLL_S)
        return None, {}

    def _bait(self) -> None:
        """Long prompts, but no more than a surviving worker can take over."""
        under_way = sum(asked.case.is_long for asked in self._clients.live.values())
        for _ in range(NUM_BAITS - under_way):
            self._clients.ask(next(self._baits))

    def _reset(self) -> Fault | None:
        """The connection of the client whose stream has had most events."""
        streaming = [asked for asked in self._clients.live.values() if asked.so_far.arrivals]
        if not streaming:
            return None
        asked = max(streaming, key=lambda one: len(one.so_far.arrivals))
        asked.reset()
        return Fault("reset", asked.label, blocking_clock())

    def _kill(self, kind: Kind, name: str) -> Fault:
        os.kill(self._fleet.pid_of(name), signal.SIGKILL)
        return Fault(kind, name, blocking_clock())

    async def _kill_gateway(self) -> Fault:
        """The one with more live requests. They are struck if they were cut off."""
        ports = list(self._clients.killed)
        clients: dict[int, list[str]] = {port: [] for port in ports}
        for label, asked in self._clients.live.items():
            if asked.so_far.sent:
                clients[asked.port].append(label)
        port = max(ports, key=lambda one: len(clients[one]))
        name = f"gateway-{ports.index(port)}"
        self._clients.killed[port].append(blocking_clock())
        fault = self._kill("kill gateway", name)
        fault.clients = clients[port]
        fault.freed_s = await self._fleet.seconds_until_free(name, fault.moment, FREED_LIMIT_S)
        return fault
