"""Everything at once, from one seed.

`python storm.py SEED` prints the digest of all that happened. With `unordered` the one to be killed comes out of a
set of names: a fault that the comparison of digests has to find.
"""

from __future__ import annotations

import asyncio
import sys

from disturbances import chance_of
from planes import NOISE
from workload import requests
from world import Scenario, World, check_exact, simulate

NUM_REQUESTS = 50


def storm(seed: int, *, unordered: bool = False) -> Scenario:
    """Noise on the bus and bad frames throughout; a kill and a restart, a freeze, a short outage."""

    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await world.start(prefill=2, decode=2, gateways=2)
        world.broker.faults = NOISE
        world.network.faults.corruption = 0.01
        offering = asyncio.create_task(world.offer(requests(seed, NUM_REQUESTS)))
        await asyncio.sleep(chance.uniform(0.2, 1.0))
        workers = {worker.settings.name: worker for worker in world.workers}
        victim = workers[next(iter(set(workers)))] if unordered else chance.choice(world.workers)
        await world.kill(victim)
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        await (world.prefill if victim.role == "prefill" else world.decode)(victim.settings.name)
        frozen = chance.choice(world.workers).settings.name
        world.freeze(frozen, deaf=chance.random() < 0.5)
        await asyncio.sleep(chance.uniform(0.3, 3.0))
        world.thaw(frozen)
        await asyncio.sleep(chance.uniform(0.0, 1.0))
        world.broker.stop()
        await asyncio.sleep(chance.uniform(0.1, 1.0))
        world.broker.restart()
        await offering
        await world.all_over()
        check_exact(world.calls)

    return scenario


if __name__ == "__main__":
    seed = int(sys.argv[1])
    print(simulate(seed, storm(seed, unordered="unordered" in sys.argv)).digest)
