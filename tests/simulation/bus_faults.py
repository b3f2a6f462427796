"""What befalls the bus, and what it loses."""

from __future__ import annotations

import asyncio

from disturbances import live_attempts
from faults import Fault
from planes import STORM
from victims import Victims, pick
from world import World


class BusFaults:
    """As `ProcessFaults`."""

    def __init__(self, world: World, victims: Victims) -> None:
        self._world = world
        self._victims = victims

    async def partition(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="both")

    async def partition_in(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="in")

    async def partition_out(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._severed(victim.settings.name, fault.lasts, ways="out")

    async def partition_gateway(self, fault: Fault) -> bool:
        core = self._victims.busy_gateway(fault)
        if core is None:
            return False
        return await self._severed(core.name, fault.lasts, ways=pick(["both", "in", "out"], fault.where))

    async def _severed(self, name: str, seconds: float, ways: str) -> bool:
        """Messages are lost, and nobody is told."""
        broker = self._world.broker
        self._world.log.record("partition", name, ways)
        if ways != "out":
            broker.deaf[name] = None
        if ways != "in":
            broker.mute[name] = None
        await asyncio.sleep(seconds)
        broker.deaf.pop(name, None)
        broker.mute.pop(name, None)
        self._world.referee.note_bus_trouble()
        return True

    async def cut_off(self, fault: Fault) -> bool:
        """A worker's connection to the bus breaks, and cannot be made again for a while."""
        victim = self._victims.needed(fault)
        if victim is None:
            return False
        self._world.broker.cut(victim.bus)  # type: ignore[arg-type]
        await asyncio.sleep(fault.lasts)
        self._world.referee.note_bus_trouble()
        if victim in self._world.workers:
            self._world.broker.heal(victim.bus)  # type: ignore[arg-type]
        return True

    async def bus_restart(self, fault: Fault) -> bool:
        broker = self._world.broker
        if not broker.running or not live_attempts(self._world):
            return False
        self._world.log.record("bus stops")
        broker.stop()
        await asyncio.sleep(fault.lasts)
        broker.restart()
        self._world.referee.note_bus_trouble()
        return True

    async def bus_storm(self, fault: Fault) -> bool:
        broker = self._world.broker
        if not live_attempts(self._world) or broker.faults is STORM:
            return False
        before, broker.faults = broker.faults, STORM
        await asyncio.sleep(min(1.0, fault.lasts))
        broker.faults = before
        return True

    async def lost_beats(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._beatless(victim.settings.name, fault.lasts)

    async def lost_gateway_beats(self, fault: Fault) -> bool:
        core = self._victims.busy_gateway(fault)
        return core is not None and await self._beatless(core.name, fault.lasts)

    async def _beatless(self, name: str, seconds: float) -> bool:
        self._world.broker.beatless[name] = None
        await asyncio.sleep(seconds)
        self._world.broker.beatless.pop(name, None)
        return True

    async def lost_batches(self, fault: Fault) -> bool:
        """For a moment no token of a decode worker gets through; often it is a stream's last one."""
        victim = self._victims.needed(fault, "decode")
        if victim is None:
            return False
        self._world.broker.tokenless[victim.settings.name] = None
        await asyncio.sleep(0.1 * fault.lasts)
        self._world.broker.tokenless.pop(victim.settings.name, None)
        return True
