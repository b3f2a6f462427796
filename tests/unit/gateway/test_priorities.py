"""What a request's priority does in the gateway: it travels, and it says who is placed first."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scripted_worker import EOS, PATIENCE_S, Cluster, Events, ScriptedWorker, completion, tokens_of

from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work

pytestmark = pytest.mark.usefixtures("no_leaks")

HELLO = [{"role": "user", "content": "hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/responses": {"input": "hi"},
}
WAITING = [("background", 5), ("normal", 0), ("urgent", -2), ("late but urgent", -2), ("urgent of all", -7)]


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.mark.parametrize("path", BODIES)
async def test_both_workers_are_told_a_request_s_priority_and_without_one_it_is_0(cluster: Cluster, path: str) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = lambda work: decode.say(work, [*tokens_of("a"), EOS])
    for fields in ({}, {"priority": -(1 << 31)}, {"priority": 7}):
        assert (await cluster.client.post(path, json=BODIES[path] | fields)).status_code == 200
    for worker, kind in ((prefill, PrefillRequest), (decode, DecodeRequest)):
        assert [request.work.priority for request in worker.got(kind)] == [0, -(1 << 31), 7]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("priority", ["high", 1.5, True, 1 << 31, -(1 << 31) - 1])
async def test_what_is_no_priority_is_refused_by_name(cluster: Cluster, path: str, priority: Any) -> None:
    response = await cluster.client.post(path, json=BODIES[path] | {"priority": priority})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "priority"


async def test_those_that_wait_for_a_worker_are_placed_by_priority_and_then_by_age(cluster: Cluster) -> None:
    dying = await cluster.worker("decode", "decode-0")
    dying.accepted = lambda work: dying.publish(work, [(0, tokens_of("x")[0])])

    async def ask(name: str, priority: int) -> str:
        body = completion(stream=True, priority=priority)
        headers = {"x-request-id": name.replace(" ", "-")}
        async with cluster.client.stream("POST", "/v1/completions", json=body, headers=headers) as response:
            events = Events(response)
            await events.next()
            await events.rest()
        return name

    tasks = []
    for count, (name, priority) in enumerate(WAITING, 1):
        tasks.append(asyncio.create_task(ask(name, priority)))
        await dying.wait_for(DecodeRequest, count)
    await dying.exit("crashed")
    async with asyncio.timeout(PATIENCE_S):
        while len(cluster.gateway.fleet.waiting) < len(WAITING):
            await asyncio.sleep(0.005)
    spare = await small(cluster)
    assert set(await asyncio.gather(*tasks)) == {name for name, _ in WAITING}
    in_order = [work.request_id.replace("-", " ") for work in accepted(spare)]
    assert in_order == ["urgent of all", "urgent", "late but urgent", "normal", "background"]


async def small(cluster: Cluster) -> ScriptedWorker:
    """A worker that has room for one request at a time, and a moment later for the next one."""
    busy: list[Work] = []

    def answer(work: Work) -> Accepted | Rejected:
        if busy:
            return Rejected(work.ticket, work.attempt, "queue_full", 0.1)
        busy.append(work)
        return Accepted(work.ticket, work.attempt)

    def script(worker: ScriptedWorker) -> Any:
        def speak(work: Work) -> None:
            worker.say(work, [*tokens_of("xyz"), EOS])
            asyncio.get_running_loop().call_later(0.05, busy.clear)

        worker.answer = answer
        return speak

    return await cluster.worker("decode", "decode-1", script)


def accepted(worker: ScriptedWorker) -> list[Work]:
    """The works that it took, in order: the first one of each request, since a refused one is asked again."""
    ended = {}
    for work in worker.works:
        ended[work.request_id] = work  # the last attempt at a request is the one that was accepted
    return sorted(ended.values(), key=lambda work: work.attempt)
