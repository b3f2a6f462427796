"""A real gateway, all of it but its HTTP server: clients enter through its ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING, Any

from processes import acting_as
from tiny import model_dir

from kvferry.runtime import TaskSet
from kvferry_gateway.app import GatewayApp
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.flights.flight import Flight
from kvferry_gateway.service import SHUTDOWN_SLACK_S, Gateway
from kvferry_gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from clients import Call
    from world import World

LOOK_S = 0.05  # how often a server looks whether it may end


class SimulatedGateway:
    """One gateway process."""

    def __init__(self, world: World, name: str, **settings: Any) -> None:
        self.name = name
        self.alive = True
        self.settings = settings
        self._world = world
        self._gateway_settings = GatewaySettings(name=name, **settings)
        self._tasks = TaskSet(lambda task, error: world.failures.append(f"{name}/{task}: {error!r}"))

    async def start(self) -> None:
        world = self._world
        self.bus = world.bus(self.name, "gateway")
        await self.bus.start()
        models = {name: model_dir() for name in world.model_names}
        self.gateway = await Gateway.start(self._gateway_settings, world.runtime, self.bus, models, pid=1, created=0)

    @property
    def app(self) -> GatewayApp:
        return self.gateway.app

    @property
    def fleet(self) -> Fleet:
        return self.gateway.fleet

    def spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        """Serve an exchange, as a task of this process."""
        with acting_as(self.name):
            self._tasks.spawn(coroutine, name)

    def flights(self, call: Call) -> Iterator[Flight]:
        """A call's choices under way."""
        label = call.request.label
        return (flight for flight in self.gateway.completions._flights if flight.unit.request_id == label)

    async def finish_answers(self) -> None:
        """As its server does before it ends: what a slow client has not taken yet gets a while, then it is cut off."""
        await asyncio.sleep(0)  # as in `stop`
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_SLACK_S):
                while len(self._tasks):
                    await asyncio.sleep(LOOK_S)
        await self._tasks.cancel()

    async def stop(self) -> None:
        """Only when every call is over."""
        await asyncio.sleep(0)  # the last exchange may end in this very turn
        await self.gateway.stop()
        await self.bus.close()
        assert len(self._tasks) == 0
        self.check_empty()

    def check_empty(self) -> None:
        """No table of the gateway remembers a request."""
        fleet = self.fleet
        assert len(fleet.table) == 0
        assert fleet.table.live() == ()
        assert not fleet.attached
        assert not fleet.waiting
        assert not fleet._dispatcher._touched
        assert not fleet._dispatcher._acks
        assert len(fleet.tasks) == 0
        assert self.gateway.completions.num_live == 0
        assert not self.gateway.completions._flights

    async def die(self) -> None:
        """As SIGKILL does: no word to anybody."""
        self.alive = False
        self._world.broker.cut(self.bus)
        await self.fleet.tasks.cancel()
        await self._tasks.cancel()
        await self.bus.close()
