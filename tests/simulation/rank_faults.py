"""What befalls single ranks of a worker."""

from __future__ import annotations

import asyncio
import contextlib

from faults import Fault
from supervisor import Supervisor
from victims import Victims, pick
from world import World


class RankFaults:
    """As `ProcessFaults`."""

    def __init__(self, world: World, victims: Victims, supervisor: Supervisor) -> None:
        self._world = world
        self._victims = victims
        self._supervisor = supervisor

    async def kill_rank(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        if victim is None or (ranks := self._victims.ranks(victim)) is None:
            return False
        await self._world.lose_rank(victim, pick(ranks.numbers, fault.where))
        await self._supervisor.ended(victim, fault)
        return True

    async def freeze_rank(self, fault: Fault) -> bool:
        """Its worker's steps do not end meanwhile; if that takes too long the worker says so, and ends."""
        victim = self._victims.needed(fault)
        if victim is None or (ranks := self._victims.ranks(victim)) is None:
            return False
        world, name, rank = self._world, victim.settings.name, pick(ranks.numbers, fault.where)
        world.log.record("freeze", name, rank)
        ranks.stop(rank)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * fault.lasts):
                await victim.wedged.wait()
        if victim.wedged.is_set():
            await world.kill(victim)
            await self._supervisor.ended(victim, fault)
            return True
        world.log.record("thaw", name, rank)
        ranks.resume(rank)
        world.referee.thawed[name] = world.true_time
        return True

    async def slow_rank(self, fault: Fault) -> bool:
        victim = self._victims.needed(fault)
        if victim is None or (ranks := self._victims.ranks(victim)) is None:
            return False
        ranks.late_s = 0.02 + 0.3 * fault.where
        await asyncio.sleep(fault.lasts)
        ranks.late_s = 0.0
        self._world.referee.thawed[victim.settings.name] = self._world.true_time
        return True
