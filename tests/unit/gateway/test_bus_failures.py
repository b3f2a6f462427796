"""Messages that are lost, doubled, late or garbage, and a bus that is gone, as clients and workers see it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from scripted_streams import TEXT, TOKENS, read, says, says_all, streaming, streaming_task
from scripted_worker import PATIENCE_S, Cluster, completion, text_in

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import MemoryBus
from kvferry.runtime import SystemRuntime
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Cancel, EndAck, Resend
from kvferry.wire.subjects import mail_subject, role_beats
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import DecodeRequest

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_a_lost_batch_is_asked_for_again_when_the_next_one_shows_the_gap(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(cluster.client.post("/v1/completions", json=completion()))
        work = (await worker.wait_for(DecodeRequest)).work
        worker.publish(work, [(0, TOKENS[0])])
        worker.publish(work, [(1, TOKENS[1])], lose=True)
        worker.publish(work, [(2, TOKENS[2])])
        resend = await worker.wait_for(Resend)
        assert resend.streams == ((work.stream_id, 1),)
        assert resend.gateway_incarnation == work.gateway_incarnation
        worker.publish(work, list(enumerate(TOKENS))[1:])
        worker.publish(work, end=("stop", len(TOKENS)))
    assert answer.result().json()["choices"][0]["text"] == TEXT
    assert cluster.metrics.value("kvferry_resend_total", cause="gap") == 1


@pytest.mark.parametrize("lost", ["tokens", "end"])
async def test_a_lost_last_batch_is_asked_for_again_because_heartbeats_promise_it(cluster: Cluster, lost: str) -> None:
    worker = await cluster.worker("decode", "decode-0")
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(cluster.client.post("/v1/completions", json=completion()))
        work = (await worker.wait_for(DecodeRequest)).work
        rows = list(enumerate(TOKENS))
        if lost == "tokens":
            worker.publish(work, rows[:-2])
            worker.publish(work, rows[-2:], ("stop", len(TOKENS)), lose=True)
            await worker.until(lambda: worker.held)
            worker.hold(work, "ended", len(TOKENS))
            resend = await worker.wait_for(Resend)
            assert resend.streams == ((work.stream_id, len(TOKENS) - 2),)
            worker.publish(work, rows[-2:], ("stop", len(TOKENS)))
        else:
            worker.publish(work, rows)
            worker.publish(work, end=("stop", len(TOKENS)), lose=True)
            worker.publish(work, end=("stop", len(TOKENS)))  # as workers do until it is confirmed
        acknowledged = await worker.wait_for(EndAck)
        assert acknowledged.stream_ids == (work.stream_id,)
    assert answer.result().json()["choices"][0]["text"] == TEXT


async def test_tokens_that_come_doubled_and_out_of_order_are_shown_once_and_in_order(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    async with streaming_task(cluster) as (events, work):
        rows = list(enumerate(TOKENS))
        decode.publish(work, rows[3:5])
        decode.publish(work, rows[1:3])
        prefill.publish(work, rows[:1])  # token 0 last of all
        assert await read(events, 5) == TEXT[:5]
        decode.publish(work, rows[:9])
        decode.publish(work, rows[2:])
        decode.publish(work, end=("stop", len(TOKENS)))
        decode.publish(work, end=("stop", len(TOKENS)))
        assert text_in(await events.rest()) == TEXT[5:]


async def test_what_comes_for_a_stream_that_is_over_is_dropped_counted_and_confirmed(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says_all(worker)
    await cluster.client.post("/v1/completions", json=completion())
    await worker.wait_for(EndAck)
    old = worker.works[0]
    worker.publish(old, [(3, 9), (4, 9)], end=("stop", 5))
    await worker.wait_for(EndAck, 2)
    assert cluster.metrics.value("kvferry_late_row_total") == 2
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT


async def test_garbage_on_the_bus_is_counted_and_disturbs_nothing(cluster: Cluster) -> None:
    worker = await cluster.speaker(TEXT)
    subject = cluster.gateway.fleet.mail_from("decode")
    good = Codecs()
    for payload in (b"", b"\x01", b"\x01garbage", b"\x63" + b"\x00" * 8, b"\xff" * 100):
        await worker.bus.publish(subject, payload)
        await worker.bus.publish(f"kvferry.{cluster.settings.cluster}.beat.decode.x.y", payload)
    odd = TokenBatch(worker.incarnation, 0, b"\x01\x00\x00\x00", b"", b"")
    await worker.bus.publish(subject, good.to_gateway.encode(odd))
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT
    metrics = cluster.metrics
    counted = sum(
        metrics.value("kvferry_wire_error_total", plane="bus", kind=k) for k in ("malformed", "unknown_version")
    )
    assert counted == 11


async def test_the_heartbeat_names_the_live_streams_of_each_worker(cluster: Cluster) -> None:
    bus = MemoryBus(cluster.broker, BusSettings("memory", "listener", "inbox.listener"), SystemRuntime())
    await bus.start()
    beats: asyncio.Queue[GatewayHeartbeat] = asyncio.Queue()
    codecs = Codecs()

    def heard(message: Any) -> None:
        beat = codecs.beat.decode(message.payload)
        assert isinstance(beat, GatewayHeartbeat)
        beats.put_nowait(beat)

    await bus.subscribe(role_beats(cluster.settings.cluster, "gateway"), heard)
    prefill, decode = await cluster.pair()
    decode.accepted = says(decode, 3)
    async with streaming(cluster) as events:
        await read(events, 3)
        work = decode.works[0]
        live = {(worker.incarnation, (work.stream_id,)) for worker in (prefill, decode)}
        async with asyncio.timeout(PATIENCE_S):
            while (beat := await beats.get()).live == ():
                pass
        assert set(beat.live) == live
        assert work.gateway == mail_subject(beat.subject, "decode")
        assert beat.incarnation == work.gateway_incarnation
    async with asyncio.timeout(PATIENCE_S):
        while (await beats.get()).live != ():
            pass
    await bus.close()


async def test_a_stream_that_a_worker_keeps_although_it_is_over_is_cancelled_again(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 3)
    async with streaming(cluster) as events:
        await read(events, 3)
    await worker.wait_for(Cancel)
    worker.hold(worker.works[0], "running", 4)  # as if that cancel had been lost
    again = await worker.wait_for(Cancel, 2)
    assert (again.ticket, again.attempt) == worker.works[0].key


async def test_a_bus_outage_is_a_pause_for_streams_and_for_new_requests(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 5)
    async with streaming(cluster) as events:
        await read(events, 5)
        cluster.broker.cut(cluster.bus)
        new = asyncio.create_task(cluster.client.post("/v1/completions", json=completion()))
        async with asyncio.timeout(PATIENCE_S):
            while not cluster.gateway.fleet.waiting:
                await asyncio.sleep(0.01)
        worker.accepted = says_all(worker)
        cluster.broker.heal(cluster.bus)
        async with asyncio.timeout(PATIENCE_S):
            while not cluster.bus.connected:
                await asyncio.sleep(0.01)
        worker.say(worker.works[0], TOKENS)
        assert text_in(await events.rest()) == TEXT[5:]
        assert (await new).json()["choices"][0]["text"] == TEXT
    assert len(worker.got(DecodeRequest)) == 2, "nobody was judged gone"
