"""What befalls processes: they are killed, hang, are drained, freeze."""

from __future__ import annotations

import asyncio
import contextlib

from checks import HANG_S
from faults import Fault
from processes import run_as
from supervisor import Supervisor
from victims import Victims
from world import World

WEDGED_S = 6.0  # by then a worker has noticed that a step does not end


class ProcessFaults:
    """A method for each kind of fault. It returns whether it has hit a live request, when all is made good."""

    def __init__(self, world: World, victims: Victims, supervisor: Supervisor) -> None:
        self._world = world
        self._victims = victims
        self._supervisor = supervisor

    async def kill(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        if victim is None:
            return False
        await self._world.kill(victim)
        await self._supervisor.ended(victim, fault)
        return True

    async def wedge(self, fault: Fault) -> bool:
        """A step does not end; the worker notices, says so, and its process ends."""
        victim = self._victims.needed(fault)
        if victim is None or self._world.runtime.disks.get(victim.settings.name):
            return False
        name = victim.settings.name
        self._world.runtime.disks[name] = HANG_S / 0.01  # of which a lane takes a share
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(WEDGED_S):
                await victim.wedged.wait()
        if victim in self._world.workers:
            await self._world.kill(victim)
            self._supervisor.tell_of(victim)
        self._world.runtime.disks.pop(name, None)
        await self._supervisor.revive(victim, fault)
        return True

    async def drain_gateway(self, fault: Fault) -> bool:
        """Requests under way get its grace time; then its clients ask another one."""
        core = self._victims.busy_gateway(fault)
        if core is None or len(self._world.cores) < 2:
            return False
        self._victims.draining[core.name] = None
        await self._world.drain_gateway(core)
        del self._victims.draining[core.name]
        await asyncio.sleep(fault.lasts)
        await self._world.core(core.name, **core.settings)
        return True

    async def drain(self, fault: Fault) -> bool:
        """As a rolling update does it."""
        victim = self._victims.needed(fault)
        if victim is None or victim.state != "ready":
            return False
        world, name = self._world, victim.settings.name

        async def ending() -> None:
            await victim.drain()
            if victim in world.workers:
                world.workers.remove(victim)
                await victim.stop()

        self._victims.draining[name] = None
        await run_as(name, ending())
        del self._victims.draining[name]
        await self._supervisor.revive(victim, fault)
        return True

    async def kill_gateway(self, fault: Fault) -> bool:
        core = self._victims.busy_gateway(fault)
        if core is None:
            return False
        await self._world.kill_gateway(core)
        await asyncio.sleep(fault.lasts)
        await self._world.core(core.name, **core.settings)
        return True

    async def freeze(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._frozen(victim.settings.name, fault.lasts, deaf=False)

    async def freeze_deaf(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        return victim is not None and await self._frozen(victim.settings.name, fault.lasts, deaf=True)

    async def freeze_gateway(self, fault: Fault) -> bool:
        core = self._victims.busy_gateway(fault)
        return core is not None and await self._frozen(core.name, fault.lasts, deaf=False)

    async def _frozen(self, name: str, seconds: float, *, deaf: bool) -> bool:
        world = self._world
        world.freeze(name, deaf=deaf)
        await asyncio.sleep(seconds)
        if name in world.network._frozen:  # else it was killed meanwhile
            world.thaw(name)
        return True

    async def slow_disk(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        if victim is None or self._world.runtime.disks.get(victim.settings.name):
            return False  # one at a time: the end of the first would end the other, or a hang
        name = victim.settings.name
        self._world.runtime.disks[name] = 0.02 + 0.3 * fault.where
        await asyncio.sleep(fault.lasts)
        self._world.runtime.disks.pop(name, None)
        self._world.referee.thawed[name] = self._world.true_time
        return True
