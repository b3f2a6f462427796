"""The books of real workers, read over HTTP: at rest nobody holds a block, a slot or a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from urllib.parse import urlsplit

from bench.books import Books, Row, violations
from stack import Stack

from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, ServerError

HOST = "127.0.0.1"
POLL_S = 0.02
HTTP_TIMEOUT_S = 10.0


async def cluster(stack: Stack) -> list[Row]:
    """The workers' rows of /v1/cluster."""
    document = await Endpoint(HOST, port_of(stack)).get_json("/v1/cluster", HTTP_TIMEOUT_S)
    return [row for row in document["workers"] if row["role"] in ("prefill", "decode")]


def port_of(stack: Stack) -> int:
    port = urlsplit(stack.url).port
    assert port is not None
    return port


async def whole(stack: Stack, num_workers: int, seconds: float = 150.0) -> list[Row]:
    """Wait until a gateway sees so many workers, all ready and heard of late."""
    deadline = blocking_clock() + seconds
    while True:
        try:
            rows = await cluster(stack)
        except (OSError, ServerError, TimeoutError):
            rows = []  # the gateway itself is being restarted
        if len(rows) == num_workers and all(row["state"] == "ready" and row["silent_s"] < 1 for row in rows):
            return rows
        assert blocking_clock() < deadline, f"not whole: {[(row['name'], row['state']) for row in rows]}"
        await asyncio.sleep(POLL_S)


async def books_of(row: Row) -> Books:
    books: Books = await Endpoint(HOST, row["debug_port"]).get_json("/debug/blocks", HTTP_TIMEOUT_S)
    return books


async def seconds_until_clean(rows: list[Row], since: float, limit: Callable[[], float]) -> float:
    """Seconds from `since` until no worker of `rows` holds anything.

    Fails when a look that began more than `limit()` seconds after it finds something, and names what is held.
    """
    while True:
        began = blocking_clock()
        found = [f"{row['name']}: {problem}" for row in rows for problem in violations(await books_of(row))]
        if not found:
            return blocking_clock() - since
        passed = began - since
        assert passed <= limit(), f"after {passed:.2f} s: " + "; ".join(found)
        await asyncio.sleep(POLL_S)
