"""Everything at once, from one seed.

`python storm.py SEED` prints the digest of all that happened, and that of the code. With `unordered` the one to be
killed comes out of a set of names: a fault that the comparison of digests has to find.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from pathlib import Path

from disturbances import chance_of
from planes import NOISE
from workload import requests
from world import Scenario, World, check_exact, simulate

import kvferry
import kvferry_decode
import kvferry_gateway
import kvferry_prefill

NUM_REQUESTS = 50
CODE = (kvferry, kvferry_decode, kvferry_gateway, kvferry_prefill)


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


def code_digest() -> str:
    """Of the sources as they are on disk. A history belongs to a seed and to the code that made it."""
    digest = hashlib.sha256()
    for folder in (*(Path(next(iter(package.__path__))) for package in CODE), Path(__file__).parent):
        for path in sorted(folder.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    seed = int(sys.argv[1])
    before = code_digest()
    history = simulate(seed, storm(seed, unordered="unordered" in sys.argv)).digest
    print(history, before)
