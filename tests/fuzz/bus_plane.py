"""Bus messages into the inboxes of real workers and of a real gateway, while they serve requests, on a virtual clock.

Whoever may publish is trusted, so a forged message may end a request. It may not crash or wedge a process, not hang a
request for longer than its deadline, and not leave anything behind: when the forger falls silent, what it left is
cleared away, and another gateway gets right answers from the same workers.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Final

from api_cluster import BYTES, ApiCluster
from cluster import check_clean, expected, settled
from fuzz.campaign import Batch, run_virtually
from fuzz.forger import Forger
from fuzz.http_plane import Sent, exchange
from scripted_gateway import ScriptedGateway

from kvferry.wire.sampling import Sampling

NUM_REQUESTS: Final = 3  # under way all the time
DEADLINE_S: Final = 20.0  # of a request
QUIET_S: Final = 40.0  # virtual, for what the forger left: longer than tombstones and leases last
# What a request may end with; 400: the only worker left is a forged one, which says that it holds less.
ENDS: Final = (200, 400, 429, 503, 504)


def bus_plane(batch: Batch) -> None:
    run_virtually(batch, _batch)


async def _batch(batch: Batch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cluster = ApiCluster()
        await cluster.open(Path(folder), disaggregated=True, request_deadline=DEADLINE_S, replace_wait=5.0)
        forger = Forger(batch, cluster)
        await forger.open()
        clients = Clients(batch, cluster)
        for _ in range(batch.num_cases):
            clients.keep_busy()
            await forger.case()
        await forger.bus.close()
        await clients.ended()
        await asyncio.sleep(QUIET_S)
        await _still_right(cluster)
        await cluster.stop()
        for worker in cluster.workers:
            check_clean(worker)


async def _still_right(cluster: ApiCluster) -> None:
    """A gateway that nobody has spoken for gets what an undisturbed run gives."""
    prefill, decode = cluster.workers
    gateway = ScriptedGateway(cluster, "gateway-after")
    await gateway.start()
    prompt = [5 + number % 200 for number in range(70)]
    sampling = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    work = await gateway.run(prompt, decode, prefill, sampling=sampling)  # type: ignore[arg-type]
    assert gateway.text(work) == expected(prompt, sampling, 8, BYTES), "the workers say something else now"
    await settled(lambda: not any(len(worker.outbox) for worker in cluster.workers), 5.0)
    await gateway.stop()


class Clients:
    """Requests at the gateway under fire. They may fail, but they must end, and not with an error of the server's."""

    def __init__(self, batch: Batch, cluster: ApiCluster) -> None:
        self._batch = batch
        self._cluster = cluster
        self._running: list[asyncio.Task[None]] = []

    def keep_busy(self) -> None:
        for task in self._running:
            if task.done():
                task.result()
        self._running = [task for task in self._running if not task.done()]
        while len(self._running) < NUM_REQUESTS:
            self._running.append(asyncio.get_running_loop().create_task(self._ask(), name="client"))

    async def ended(self) -> None:
        async with asyncio.timeout(3 * DEADLINE_S):
            await asyncio.gather(*self._running)

    async def _ask(self) -> None:
        chance = self._batch.chance
        prompt = [chance.randrange(1, 257) for _ in range(chance.choice((3, 40, 90)))]
        body = {"model": "memory", "prompt": prompt, "max_tokens": chance.randint(1, 40), "ignore_eos": True,
                "stream": chance.random() < 0.5, "logprobs": chance.choice((None, None, 2))}  # fmt: skip
        sent = Sent("POST", "/v1/completions", (), (json.dumps(body).encode(),), None)
        answer = await exchange(self._cluster.api.app, sent)
        assert answer.status in ENDS, f"{answer.status} {answer.body[:300]!r}"
        assert b"internal_error" not in answer.body, answer.body[-300:]
        assert answer.whole
