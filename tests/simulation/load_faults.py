"""What clients do to a cluster."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from disturbances import live_attempts
from faults import Fault
from victims import Victims
from workload import MAX_PROMPT, ClientRequest, requests
from world import World

BURST = 5  # requests


class LoadFaults:
    """As `ProcessFaults`."""

    def __init__(self, world: World, victims: Victims) -> None:
        self.max_prompt = MAX_PROMPT
        self.forced = False  # requests of a burst tell their token ids
        self._world = world
        self._victims = victims
        self._next_number = 10_000  # of the requests that a burst makes

    async def slow_client(self, fault: Fault) -> bool:
        call = self._victims.open_call(fault)
        if call is None or call.exchange is None:
            return False
        exchange = call.exchange
        call.pause()
        await asyncio.sleep(fault.lasts)
        exchange.resume()
        return True

    async def leave(self, fault: Fault) -> bool:
        call = self._victims.open_call(fault)
        if call is None:
            return False
        call.leave()
        return True

    async def burst(self, fault: Fault) -> bool:
        """Long requests, all at once: the pools are full."""
        if not live_attempts(self._world):
            return False
        for plain in requests(int(fault.where * 1000), BURST, seconds=0.0, max_prompt=self.max_prompt):
            prompt = (plain.prompt * self.max_prompt)[: self.max_prompt - 10 * (plain.number + 1)]
            self._world.open(self._numbered(plain, prompt))
        return True

    def _numbered(self, plain: ClientRequest, prompt: tuple[int, ...]) -> ClientRequest:
        self._next_number += 1
        return replace(plain, number=self._next_number, prompt=prompt, wants_ids=self.forced)
