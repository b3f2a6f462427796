"""Whom a fault hits: one that a live request needs at this moment, and that no other fault has."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from clients import Call
from disturbances import live_attempts
from faults import PHASES, RANK_KINDS, STATES, Fault
from gateways import SimulatedGateway
from ranks import SimulatedRanks
from world import World

from kvferry.worker.worker import Worker


class Victims:
    """Of a world. None where there is nobody to hit."""

    def __init__(self, world: World) -> None:
        self.draining: dict[str, None] = {}  # names of those that a fault drains
        self._world = world

    def needed(self, fault: Fault, role: str | None = None) -> Worker[Any] | None:
        """A worker that has a live request in the fault's phase; one with ranks for a fault of theirs."""
        states = STATES[fault.phase]
        live = {attempt.ticket for _, _, attempt in live_attempts(self._world)}
        found = [
            worker
            for worker in self._world.workers
            if role in (None, worker.role)
            and not self._disturbed(worker.settings.name)
            and self._suits(worker, fault)
            and any(s.state in states and s.work.ticket in live for s in worker.scheduler.sequences.values())
        ]
        return pick(found, fault.where)

    def any_phase(self, fault: Fault) -> Fault:
        """The same fault, in a phase that some worker has a sequence in."""
        workers = [worker for worker in self._world.workers if self._suits(worker, fault)]
        victim = next((s for worker in workers for s in worker.scheduler.sequences.values()), None)
        if victim is None:
            return fault
        phase = next(phase for phase in PHASES if victim.state in STATES[phase])
        return replace(fault, phase=phase)

    def _suits(self, worker: Worker[Any], fault: Fault) -> bool:
        return fault.kind not in RANK_KINDS or self.ranks(worker) is not None

    def ranks(self, worker: Worker[Any]) -> SimulatedRanks | None:
        return self._world.runtime.ranks.get(worker.settings.name)

    def busy_gateway(self, fault: Fault) -> SimulatedGateway | None:
        found = [
            core for core in self._world.cores if len(core.fleet.table) and not self._disturbed(core.name)
        ]  # fmt: skip
        return pick(found, fault.where)

    def _disturbed(self, name: str) -> bool:
        broker = self._world.broker
        unreachable = name in broker.deaf or name in broker.mute
        hangs = self._world.referee.hangs(name)
        return unreachable or hangs or name in self._world.network._frozen or name in self.draining

    def pair(self, fault: Fault) -> tuple[Worker[Any], Worker[Any]] | None:
        """Prefill and decode worker of a hand-off under way."""
        pairs: dict[tuple[str, str], tuple[Worker[Any], Worker[Any]]] = {}
        for _, _, attempt in live_attempts(self._world):
            if attempt.prefill is None or attempt.running:
                continue
            p, d = self._world.worker(attempt.prefill.name), self._world.worker(attempt.decode.name)
            if p is not None and d is not None:
                pairs[attempt.prefill.name, attempt.decode.name] = (p, d)
        return pick(list(pairs.values()), fault.where)

    def open_call(self, fault: Fault) -> Call | None:
        found = [call for call in self._world.calls if call.outcome == "open" and call.exchange and not call.has_left]
        return pick(found, fault.where)


def pick(found: list[Any], where: float) -> Any:
    """`where`: from 0 to 1."""
    return found[min(int(where * len(found)), len(found) - 1)] if found else None
