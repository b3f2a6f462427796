"""Streams of a gateway's clients, and workers that say a known text."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from scripted_worker import EOS, Cluster, Events, ScriptedWorker, completion, text_in, tokens_of

from kvferry.wire.work import DecodeRequest, Work

TEXT = "The quick brown fox"
TOKENS = [*tokens_of(TEXT), EOS]


@asynccontextmanager
async def streaming(cluster: Cluster, **fields: Any) -> AsyncIterator[Events]:
    async with cluster.client.stream("POST", "/v1/completions", json=completion(stream=True, **fields)) as response:
        assert response.status_code == 200, await response.aread()
        yield Events(response)


def says(worker: ScriptedWorker, count: int) -> Any:
    """Publish the next `count` tokens of TOKENS upon acceptance, and no end."""

    def speak(work: Work) -> None:
        start = len(work.generated) // 4
        rows = [(index, TOKENS[index]) for index in range(start, min(start + count, len(TOKENS)))]
        for row in rows:
            worker.publish(work, [row])
        worker.hold(work, "running", start + len(rows))

    return speak


def says_all(worker: ScriptedWorker) -> Any:
    return lambda work: worker.say(work, TOKENS)


async def read(events: Events, count: int) -> str:
    """Text of the next `count` events."""
    return text_in([await events.next() for _ in range(count)])


@asynccontextmanager
async def streaming_task(cluster: Cluster, **fields: Any) -> AsyncIterator[tuple[Events, Work]]:
    """A stream and the work that its decode worker got."""
    decode = next(worker for worker in cluster.workers.values() if worker.role == "decode")
    async with streaming(cluster, **fields) as events:
        yield events, (await decode.wait_for(DecodeRequest)).work
