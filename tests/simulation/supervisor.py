"""Starts what has died, and may say that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from faults import Fault
from world import World

from kvferry.wire.beats import ExitNotice
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import exit_subject
from kvferry.worker.worker import Worker


class Supervisor:
    """Of all processes of a world."""

    def __init__(self, world: World, restart: Callable[[Worker[Any]], Awaitable[Any]]) -> None:
        """`restart` starts a worker like the one that it is given, with the same name."""
        self._world = world
        self._restart = restart
        self._codecs = Codecs()

    def tell_of(self, victim: Worker[Any]) -> None:
        """As a supervisor does."""
        name, incarnation = victim.settings.name, victim.incarnation
        notice = self._codecs.beat.encode(ExitNotice(incarnation, "killed"))
        if self._world.broker.running:
            self._world.broker.send(0, exit_subject("dev", victim.role, name, incarnation), notice, "")

    async def ended(self, victim: Worker[Any], fault: Fault) -> None:
        """Its process has ended: the supervisor may say so, and starts it again."""
        if fault.where < 0.5:
            self.tell_of(victim)
        await self.revive(victim, fault)

    async def revive(self, victim: Worker[Any], fault: Fault) -> None:
        """Start it again after a while, unless another fault's end has."""
        await asyncio.sleep(fault.lasts)
        if self._world.worker(victim.settings.name) is None:
            await self._restart(victim)
