"""A gateway that drains: what is refused, finished and cut off. On a real socket."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from cluster import settled
from scripted_streams import TEXT, TOKENS, read, says, streaming
from scripted_worker import PATIENCE_S, Cluster, completion, text_in

from kvferry.wire.orders import Cancel, EndAck
from kvferry.wire.work import DecodeRequest

pytestmark = pytest.mark.usefixtures("no_leaks")

OUTCOMES = ("ok", "client_gone")


async def test_draining_refuses_what_is_new_and_finishes_what_is_under_way(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 5)
    async with streaming(cluster) as events:
        await read(events, 5)
        drained = asyncio.create_task(cluster.gateway.completions.drain(10))
        await asyncio.sleep(0)
        assert (await cluster.client.get("/ready")).status_code == 503
        refused = await cluster.client.post("/v1/completions", json=completion())
        assert refused.json()["error"]["code"] == "shutting_down"
        assert not drained.done()
        worker.say(worker.works[0], TOKENS)
        assert text_in(await events.rest()) == TEXT[5:]
        await drained


async def test_what_does_not_end_within_the_grace_time_ends_in_an_error(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 5)
    async with streaming(cluster) as events:
        await read(events, 5)
        await cluster.gateway.completions.drain(0.05)
        rest = await events.rest()
    assert rest[-1]["error"]["code"] == "shutting_down"
    await worker.wait_for(Cancel)


async def test_an_answer_that_a_drain_has_cut_off_does_not_end_as_if_it_were_whole(cluster: Cluster) -> None:
    """Through plain ASGI. The client stops reading, and goes on when it has been given up (simulation, seed 1033)."""
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 5)
    asked = [{"type": "http.request", "body": json.dumps(completion(stream=True)).encode(), "more_body": False}]
    sent: list[Any] = []
    reading = asyncio.Event()

    async def receive() -> Any:
        if asked:
            return asked.pop()
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)
        if message.get("body"):
            await reading.wait()

    scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": "/v1/completions", "headers": []}
    serving = asyncio.create_task(cluster.gateway.app(scope, receive, send))
    await settled(lambda: len(sent) > 1, PATIENCE_S)
    drained = asyncio.create_task(cluster.gateway.completions.drain(0.05))
    await settled(
        lambda: all(connection.lost for connection in cluster.gateway.completions._flights.values()), PATIENCE_S
    )
    reading.set()
    await serving
    await drained
    assert sent[0]["status"] == 200
    assert all(message["more_body"] for message in sent[1:])


async def test_a_client_that_never_reads_the_end_of_its_answer_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    """The answer is complete, the client does not read, and what waits for it is within the bound."""
    options = {"max_backlog_bytes": 64 << 20, "model_options": {"max_context": 1 << 20}}
    async with Cluster(tmp_path, **options) as cluster:
        worker = await cluster.worker("decode", "decode-0", max_model_len=1 << 20, num_blocks=1 << 17)
        num_tokens = 60_000  # some 10 MB of events: more than the kernel's buffers take
        body = cluster.client.build_request(
            "POST", "/v1/completions", json=completion(stream=True, max_tokens=num_tokens)
        ).content
        _, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1], limit=1024)
        writer.transport.pause_reading()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        work = (await worker.wait_for(DecodeRequest)).work
        for start in range(0, num_tokens, 1000):
            worker.publish(work, [(index, 1 + ord("x")) for index in range(start, start + 1000)])
        worker.publish(work, end=("length", num_tokens))
        await worker.wait_for(EndAck)
        async with asyncio.timeout(PATIENCE_S):
            await cluster.gateway.completions.drain(0.05)
        outcomes = {o: cluster.metrics.value("kvferry_request_total", route="text", outcome=o) for o in OUTCOMES}
        assert outcomes == {"ok": 0, "client_gone": 1}, "it was not delivered"
        writer.close()
