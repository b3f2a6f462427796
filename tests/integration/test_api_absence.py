"""What a new request meets while no worker is there, over a real gateway and real workers on a virtual clock."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from api_cluster import BYTES, ApiCluster, api, scenario
from cluster import settled

from kvferry.runtime import now
from kvferry_decode.worker import DecodeWorker
from kvferry_gateway.flights.patience import NEW_REQUEST_WAIT, RECENT_ABSENCE

TEXT = "/v1/completions"
AT_ONCE_S = 0.1
TICK_S = 0.3  # between two looks at who is there


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "memory", "prompt": "Once upon a time " * 4, "max_tokens": 6, "ignore_eos": True, **fields}


async def lose_decode(cluster: ApiCluster) -> None:
    """Until the gateway knows that it is gone."""
    await cluster.kill(next(worker for worker in cluster.workers if isinstance(worker, DecodeWorker)))
    await settled(lambda: not cluster.api.fleet.registry.has_pair("memory"), 5.0)


async def refused_after(cluster: ApiCluster, status: int = 503) -> float:
    began = now()
    response = await cluster.http.post(TEXT, json=text(), timeout=None)
    assert response.status_code == status, response.text
    if status == 503:
        assert response.json()["error"]["code"] == "no_worker"
        assert int(response.headers["retry-after"]) >= 1
    return now() - began


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_it_waits_for_the_successor_of_a_worker_that_was_there_a_moment_ago(stream: bool, n: int) -> None:
    async def test(cluster: ApiCluster) -> None:
        await lose_decode(cluster)
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(stream=stream, n=n)))
        await settled(lambda: bool(cluster.api.fleet.waiting), 1.0)
        (waiting,) = (await cluster.http.get("/v1/cluster")).json()["gateway"]["waiting"]
        assert (waiting["model"], "No worker" in waiting["why"]) == ("memory", True)
        await asyncio.sleep(3.0)
        assert not asking.done()
        await cluster.decode("decode-9", model=BYTES)
        await asking
        assert not cluster.api.fleet.waiting

    api(test)


@scenario
async def test_it_waits_while_the_only_worker_drains(cluster: ApiCluster) -> None:
    """The gateway may hear so from the worker's answer, before a heartbeat says it."""
    for worker in cluster.workers:
        worker.state = "draining"
    asking = asyncio.ensure_future(cluster.ask(TEXT, text()))
    await asyncio.sleep(2.0)
    assert not asking.done()
    for worker in cluster.workers:
        worker.state = "ready"
    await asking


@scenario
async def test_if_nobody_comes_it_is_refused_after_a_while_and_later_ones_at_once(cluster: ApiCluster) -> None:
    await lose_decode(cluster)
    assert NEW_REQUEST_WAIT <= await refused_after(cluster) < NEW_REQUEST_WAIT + TICK_S
    await asyncio.sleep(RECENT_ABSENCE - NEW_REQUEST_WAIT)
    assert await refused_after(cluster) < AT_ONCE_S


@pytest.mark.parametrize("outage_s", [1.0, 2 * RECENT_ABSENCE])
def test_it_waits_for_those_who_have_not_yet_come_back_after_an_outage_of_the_bus(outage_s: float) -> None:
    async def test(cluster: ApiCluster) -> None:
        cluster.broker.cut(cluster.bus_of_gateway)
        await asyncio.sleep(outage_s)
        if outage_s > RECENT_ABSENCE:
            assert await refused_after(cluster) < AT_ONCE_S
        for worker in cluster.workers:
            cluster.broker.cut(worker.bus)  # type: ignore[arg-type]
        cluster.broker.heal(cluster.bus_of_gateway)
        await settled(lambda: cluster.bus_of_gateway.connected, 5.0)
        asking = asyncio.ensure_future(cluster.ask(TEXT, text()))
        await asyncio.sleep(1.0)
        assert not asking.done()
        for worker in cluster.workers:
            cluster.broker.heal(worker.bus)  # type: ignore[arg-type]
        await asking

    api(test)


@scenario
async def test_a_client_that_hangs_up_meanwhile_leaves_nothing(cluster: ApiCluster) -> None:
    await lose_decode(cluster)
    began = now()
    await cluster.leave(TEXT, text(), lambda: bool(cluster.api.fleet.waiting))
    assert now() - began < 1.0
    assert not cluster.api.fleet.waiting
    assert cluster.api.completions.num_live == 0
    await cluster.decode("decode-9", model=BYTES)
    await settled(lambda: cluster.api.fleet.registry.has_pair("memory"), 5.0)
    assert cluster.api.fleet.metrics.value("kvferry_placement_total") == 0


def test_its_deadline_holds_while_it_waits() -> None:
    async def test(cluster: ApiCluster) -> None:
        await lose_decode(cluster)
        assert 1.0 <= await refused_after(cluster, 504) < 1.0 + TICK_S

    api(test, request_deadline=1.0)


@scenario
async def test_a_gateway_that_ends_waits_no_longer_than_its_grace(cluster: ApiCluster) -> None:
    await lose_decode(cluster)
    asking = asyncio.ensure_future(cluster.http.post(TEXT, json=text(), timeout=None))
    await settled(lambda: bool(cluster.api.fleet.waiting), 1.0)
    began = now()
    await cluster.api.completions.drain(0.5)
    assert now() - began < 1.0
    assert (await asking).json()["error"]["code"] == "shutting_down"
