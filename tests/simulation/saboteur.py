"""Carries out a schedule of faults (`faults.py`).

Each waits until it hits something: its victim is among those that a live request needs at that moment.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from bus_faults import BusFaults
from data_faults import DataFaults
from faults import Fault
from load_faults import LoadFaults
from process_faults import ProcessFaults
from rank_faults import RankFaults
from supervisor import Supervisor
from victims import Victims
from world import World

from kvferry.runtime import now
from kvferry.worker.worker import Worker

LOOK_S = 0.003  # how often a fault looks whether it can hit
PATIENCE_S = 1.5  # for its phase; then any will do


class Saboteur:
    """`hits`: the kinds of those faults that hit a live request."""

    def __init__(self, world: World, restart: Callable[[Worker[Any]], Awaitable[Any]]) -> None:
        """`restart` starts a worker like the one that it is given, with the same name."""
        self.hits: list[str] = []
        self.load = LoadFaults(world, victims := Victims(world))
        self._world = world
        self._victims = victims
        supervisor = Supervisor(world, restart)
        self._deeds = (
            ProcessFaults(world, victims, supervisor),
            RankFaults(world, victims, supervisor),
            BusFaults(world, victims),
            DataFaults(world, victims),
            self.load,
        )

    async def carry_out(self, faults: Iterable[Fault]) -> None:
        """All of them, to their ends."""
        began = now()
        tasks = []
        for number, fault in enumerate(faults):
            await asyncio.sleep(max(0.0, began + fault.at - now()))
            tasks.append(self._world.spawn(self._one(fault), f"fault-{number}"))
        await asyncio.gather(*tasks)

    async def _one(self, fault: Fault) -> None:
        act = self._deed(fault.kind)
        began = now()
        # Nothing is disturbed where no request lives any more.
        while any(call.outcome == "open" for call in self._world.calls) or now() - began < PATIENCE_S:
            if await act(fault if now() - began < PATIENCE_S else self._victims.any_phase(fault)):
                self.hits.append(fault.kind)
                return
            await asyncio.sleep(LOOK_S)

    def _deed(self, kind: str) -> Callable[[Fault], Awaitable[bool]]:
        deed: Callable[[Fault], Awaitable[bool]] = next(
            getattr(deeds, kind) for deeds in self._deeds if hasattr(deeds, kind)
        )
        return deed
