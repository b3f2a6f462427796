"""What befalls the data plane, and what comes over it."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from faults import Fault
from victims import Victims, pick
from world import World

from kvferry.wire.flow import Open
from kvferry.worker.worker import Worker

NUM_BAD_FRAMES = 6


class DataFaults:
    """As `ProcessFaults`."""

    def __init__(self, world: World, victims: Victims) -> None:
        self._world = world
        self._victims = victims

    async def data_partition(self, fault: Fault) -> bool:
        pair = self._victims.pair(fault)
        return pair is not None and await self._blocked(pair, fault.lasts, one_way=False)

    async def data_partition_one_way(self, fault: Fault) -> bool:
        pair = self._victims.pair(fault)
        if pair is None:
            return False
        return await self._blocked(pair if fault.where < 0.5 else pair[::-1], fault.lasts, one_way=True)

    async def _blocked(self, pair: tuple[Worker[Any], Worker[Any]], seconds: float, *, one_way: bool) -> bool:
        here, there = (worker.settings.name for worker in pair)
        ways = ((here, there),) if one_way else ((here, there), (there, here))
        for way in ways:
            self._world.network.block(*way)
        await asyncio.sleep(seconds)
        for way in ways:
            self._world.network.unblock(*way)
        return True

    async def reset(self, fault: Fault) -> bool:
        pair = self._victims.pair(fault)
        if pair is None:
            return False
        self._world.log.record("reset", pair[0].settings.name, pair[1].settings.name)
        self._world.network.cut(pair[0].settings.name, pair[1].settings.name)
        return True

    async def bad_frames(self, fault: Fault) -> bool:
        faults = self._world.network.faults
        if self._victims.needed(replace(fault, phase="fetching"), "decode") is None:
            return False
        faults.next_wrong += 1 + int(fault.where * NUM_BAD_FRAMES)
        return True

    async def mixed_up(self, fault: Fault) -> bool:
        """The next hand-off that can be is mixed up with another of as many tokens: P serves the wrong request."""
        world = self._world
        if world.network.mix_up is not None:
            return False
        mixed = asyncio.get_running_loop().create_future()

        def mix_up(process: str, message: Open) -> Open:
            worker = world.worker(process)
            if worker is None:
                return message
            sequences = worker.scheduler.sequences
            meant = sequences.get((message.ticket, message.attempt))
            if meant is None:
                return message
            others = [s for s in sequences.values() if s is not meant and s.num_context == meant.num_context]
            # Best one that is computed: its frames are here before anybody can say that they are not wanted.
            others = [s for s in others if s.state == "held"] or others
            if not others:
                return message
            other = pick(others, fault.where)
            world.network.mix_up = None
            world.referee.took_memory(meant.key)  # D believes what P says of the other one
            world.log.record("mixed up", process)
            if not mixed.done():
                mixed.set_result(None)
            return Open(message.pull_id, *other.key)

        world.network.mix_up = mix_up
        await asyncio.wait((mixed,), timeout=3.0)
        if world.network.mix_up is mix_up:
            world.network.mix_up = None
        if not mixed.done():
            mixed.cancel()
            return False
        return True
