"""All requests of a load: each at its time, or so many at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvferry.runtime import blocking_clock
from kvferry_local.bench.client import Outcome, ask
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.workload import Planned

MakeBody = Callable[[Planned, int], dict[str, Any]]


async def open_loop(
    endpoint: Endpoint, path: str, planned: Sequence[Planned], make_body: MakeBody, timeout: float
) -> list[Outcome]:
    """Each request at its time, however many are under way: what a service meets."""
    began = blocking_clock()
    tasks = []
    async with asyncio.TaskGroup() as group:
        for number, request in enumerate(planned):
            body = make_body(request, number)
            await asyncio.sleep(max(0.0, began + request.at - blocking_clock()))
            tasks.append(group.create_task(ask(endpoint, path, body, began + request.at, timeout)))
    return [task.result() for task in tasks]


async def closed_loop(
    endpoint: Endpoint, path: str, planned: Sequence[Planned], make_body: MakeBody, timeout: float, concurrency: int
) -> list[Outcome]:
    """`concurrency` clients, each asking again as soon as it has its answer: what a server can do."""
    left: Iterator[tuple[int, Planned]] = iter(enumerate(planned))
    outcomes: list[Outcome] = []

    async def client() -> None:
        for number, request in left:
            outcomes.append(await ask(endpoint, path, make_body(request, number), blocking_clock(), timeout))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return outcomes
