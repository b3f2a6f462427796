"""Clients that leave or do not read: what the workers are told, and what it costs others. On a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from scripted_streams import TEXT, TOKENS, read, says, streaming
from scripted_worker import PATIENCE_S, Cluster, completion, text_in

from kvferry.wire.orders import Cancel
from kvferry.wire.work import DecodeRequest, PrefillRequest

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_a_disconnect_in_mid_stream_cancels_on_both_workers_at_once(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = says(decode, 3)
    async with streaming(cluster) as events:
        await read(events, 3)
        started = asyncio.get_running_loop().time()
    cancel = await decode.wait_for(Cancel)
    assert asyncio.get_running_loop().time() - started < 0.1
    assert (cancel.ticket, cancel.attempt) == decode.works[0].key
    assert await prefill.wait_for(Cancel) == cancel
    assert cluster.gateway.fleet.table.live() == ()
    assert cluster.metrics.value("kvferry_request_total", route="text", outcome="client_gone") == 1


async def raw_request(cluster: Cluster, stream: bool) -> asyncio.StreamWriter:
    """Send a request and keep the connection."""
    body = cluster.client.build_request("POST", "/v1/completions", json=completion(stream=stream)).content
    _, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1])
    writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    return writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("phase", ["asked", "accepted"])
async def test_a_disconnect_before_the_first_token_cancels_too(cluster: Cluster, stream: bool, phase: str) -> None:
    prefill, decode = await cluster.pair()
    if phase == "asked":
        decode.answer = lambda work: None
    writer = await raw_request(cluster, stream)
    await decode.wait_for(DecodeRequest)
    await prefill.wait_for(PrefillRequest)
    if phase == "accepted":
        async with asyncio.timeout(PATIENCE_S):
            while not cluster.metrics.value("kvferry_placement_total", kind="pair"):
                await asyncio.sleep(0.005)
    writer.close()
    assert (await decode.wait_for(Cancel)).attempt == decode.works[0].attempt
    assert (await prefill.wait_for(Cancel)).attempt == decode.works[0].attempt


async def test_a_slow_client_costs_only_its_own_stream(tmp_path: Path) -> None:
    async with Cluster(tmp_path, max_backlog_bytes=20_000, model_options={"max_context": 1 << 20}) as cluster:
        worker = await cluster.worker("decode", "decode-0", max_model_len=1 << 20, num_blocks=1 << 17)
        body = cluster.client.build_request(
            "POST", "/v1/completions", json=completion(stream=True, max_tokens=500_000)
        ).content
        reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1], limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        slow = (await worker.wait_for(DecodeRequest)).work
        worker.accepted = lambda work: None if work == slow else worker.say(work, TOKENS)
        index = 0
        async with asyncio.timeout(PATIENCE_S):
            while not worker.got(Cancel):
                worker.publish(slow, [(index + step, 1 + ord("x")) for step in range(500)])
                index += 500
                await asyncio.sleep(0.005)  # a step
        assert worker.got(Cancel)[0].attempt == slow.attempt
        assert cluster.metrics.value("kvferry_slow_client_total") == 1
        async with streaming(cluster) as events:
            assert text_in(await events.rest()) == TEXT
        writer.close()
        assert reader is not None
