"""The hand-off between real workers in one process, on a virtual clock, with a model that wrong KV cannot fool."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from kvferry.runtime import now
from kvferry.wire.messages import Accepted, Sampling
from cluster import Cluster, check_clean, expected
from virtual_loop import VirtualLoop

GREEDY = Sampling(temperature=0.0, max_tokens=8)


def virtual(scenario: Callable[[Cluster], Awaitable[None]], limit: float = 300.0) -> None:
    """Run a scenario on a virtual clock and check that it leaves nothing behind."""
    import asyncio

    async def body() -> None:
        cluster = Cluster()
        await scenario(cluster)
        await cluster.stop()

    with asyncio.Runner(loop_factory=lambda: VirtualLoop(limit)) as runner:
        runner.run(body())


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return [(seed * 31 + position * 7 + 3) % 251 for position in range(length)]


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 200, 400])
def test_a_prompt_prefilled_elsewhere_gives_the_tokens_of_an_undisturbed_run(length: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(length))
        answers = await gateway.place(work, decode, prefill)
        assert all(isinstance(answer, Accepted) for answer in answers)
        end = await gateway.ended(work)
        assert end.reason == "length"
        assert gateway.text(work) == expected(prompt_of(length), GREEDY, 8)
        value = decode.metrics.value
        assert value("kvferry_pull_total", outcome="received") == 1
        assert value("kvferry_kv_token_total", direction="received") == length

    virtual(scenario)
