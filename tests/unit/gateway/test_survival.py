"""What a client sees when workers, clients, or the bus fail, and what the workers are told. On a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cluster import settled
from scripted_worker import EOS, PATIENCE_S, Cluster, Events, ScriptedWorker, completion, text_in, tokens_of

from kvferry.bus.base import BusSettings
from kvferry.bus.memory import MemoryBus
from kvferry.runtime import SystemRuntime
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Cancel, EndAck, Fence, Ping, Resend
from kvferry.wire.subjects import mail_subject, role_beats
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import DecodeRequest, PrefillRequest, Rejected, Work

pytestmark = pytest.mark.usefixtures("no_leaks")

OUTCOMES = ("ok", "client_gone")
TEXT = "The quick brown fox"
TOKENS = [*tokens_of(TEXT), EOS]


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


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


# -- clients ---------------------------------------------------------------------------------------------------


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


# -- messages that are lost, doubled, late ---------------------------------------------------------------------


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


@asynccontextmanager
async def streaming_task(cluster: Cluster, **fields: Any) -> AsyncIterator[tuple[Events, Work]]:
    """A stream and the work that its decode worker got."""
    decode = next(worker for worker in cluster.workers.values() if worker.role == "decode")
    async with streaming(cluster, **fields) as events:
        yield events, (await decode.wait_for(DecodeRequest)).work


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


# -- workers that do not take a request ------------------------------------------------------------------------


async def test_a_worker_that_keeps_silent_is_asked_twice_and_then_another(cluster: Cluster) -> None:
    silent = await cluster.worker("decode", "a-silent")
    silent.answer = lambda work: None
    await cluster.speaker(TEXT, running=20)
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT
    assert len(silent.got(DecodeRequest)) == 2
    assert (await silent.wait_for(Ping)) is not None, "its silence is a suspicion"
    assert (await silent.wait_for(Cancel)).attempt == silent.works[0].attempt


async def test_where_nobody_listens_the_next_worker_is_asked_at_once(cluster: Cluster) -> None:
    dead = await cluster.worker("decode", "a-dead")
    await cluster.speaker(TEXT, running=20)
    assert dead._subscription is not None
    await dead._subscription.close()
    dead.freeze()
    began = asyncio.get_running_loop().time()
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT
    assert asyncio.get_running_loop().time() - began < 0.25
    assert cluster.gateway.fleet.registry.state_of(dead.incarnation) is None, "the ping found nobody either"


async def test_when_one_of_a_pair_refuses_the_other_is_cancelled_and_the_next_try_is_a_new_attempt(
    cluster: Cluster,
) -> None:
    prefill, decode = await cluster.pair()
    decode.answer = lambda work: Rejected(work.ticket, work.attempt, "draining")
    await cluster.speaker(TEXT, running=20)
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT
    first, second = (item.work for item in prefill.got(PrefillRequest))
    assert (await prefill.wait_for(Cancel)).attempt == first.attempt
    assert second.attempt > first.attempt
    assert second.ticket != first.ticket
    assert second.stream_id != first.stream_id
    assert second.unit == first.unit


# -- workers that are lost -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["killed", "frozen", "wedged", "forgetful"])
async def test_a_lost_decode_worker_costs_a_pause_and_no_token(cluster: Cluster, how: str) -> None:
    first = await cluster.worker("decode", "a-first")
    first.accepted = says(first, 5)
    async with streaming(cluster) as events:
        assert await read(events, 5) == TEXT[:5]
        second = await cluster.worker("decode", "b-second")
        second.accepted = says_all(second)
        began = asyncio.get_running_loop().time()
        match how:
            case "killed":
                await first.exit("killed")
            case "frozen":
                first.freeze()
            case "wedged":
                first.state = "wedged"
            case "forgetful":
                first.forget(first.works[0])
                first.answer = lambda work: Rejected(
                    work.ticket, work.attempt, "queue_full"
                )  # it lives, and may be asked
        resumed = (await second.wait_for(DecodeRequest)).work
        assert asyncio.get_running_loop().time() - began < 2.0, "a new worker has it within 2 s"
        assert unpack_tokens(resumed.generated).tolist() == TOKENS[:5]
        assert resumed.prompt == first.works[0].prompt
        assert resumed.sampling == first.works[0].sampling, "the same seed"
        assert resumed.arrival == first.works[0].arrival
        assert text_in(await events.rest()) == TEXT[5:]


async def test_a_worker_whose_tokens_come_is_alive_though_its_heartbeats_are_late(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "a-first")
    async with streaming(cluster) as events:
        work = (await worker.wait_for(DecodeRequest)).work
        worker.beats = False
        for index in range(15):  # 2.25 s
            worker.publish(work, [(index, TOKENS[index])])
            await asyncio.sleep(0.15)
        worker.beats = True
        worker.say(work, TOKENS)
        assert text_in(await events.rest()) == TEXT
    assert len(worker.works) == 1


async def test_a_worker_that_comes_back_from_a_freeze_is_fenced_and_what_it_says_is_not_shown(cluster: Cluster) -> None:
    first = await cluster.worker("decode", "a-first")
    first.accepted = says(first, 5)
    async with streaming(cluster) as events:
        await read(events, 5)
        second = await cluster.worker("decode", "b-second")
        second.accepted = says(second, 2)
        first.freeze()
        work = (await second.wait_for(DecodeRequest)).work
        first.frozen = False
        old = first.works[0]
        first.publish(old, [(7, 1 + ord("!")), (8, 1 + ord("!"))], ("stop", 9))
        fence = await first.wait_for(Fence)
        assert fence.worker_incarnation == first.incarnation
        assert fence.gateway_incarnation == old.gateway_incarnation
        assert old.attempt <= fence.highest_attempt < work.attempt
        second.say(work, TOKENS)
        assert text_in(await events.rest()) == TEXT[5:]


async def test_prefill_lost_before_decode_runs_is_placed_again_and_afterwards_changes_nothing(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = lambda work: decode.hold(work, "opening", 0)
    async with streaming(cluster) as events:
        await prefill.wait_for(PrefillRequest)
        spare = await cluster.worker("prefill", "spare")
        decode.accepted = says(decode, 4)
        await prefill.exit("killed")
        await spare.wait_for(PrefillRequest)
        again = await decode.wait_for(DecodeRequest, 2)
        assert again.prefill == spare.record.address
        await read(events, 4)
        await spare.exit("killed")
        async with asyncio.timeout(PATIENCE_S):
            while cluster.gateway.fleet.registry.state_of(spare.incarnation):
                await asyncio.sleep(0.005)
        work = decode.works[-1]
        decode.say(work, TOKENS)
        assert text_in(await events.rest()) == TEXT[4:]
    assert len(decode.got(DecodeRequest)) == 2
    assert cluster.metrics.value("kvferry_replacement_total", reason="prefill_gone") == 1


async def test_a_prefill_worker_whose_data_plane_broke_is_not_tried_again_though_it_is_not_judged_yet(
    cluster: Cluster,
) -> None:
    prefill, decode = await cluster.pair()
    lost = prefill.record.address

    def fails_with_the_lost_one(work: Work) -> None:
        if decode.got(DecodeRequest)[-1].prefill == lost:
            decode.publish(work, end=("prefill_lost", 0))
        else:
            decode.say(work, TOKENS)

    decode.accepted = fails_with_the_lost_one
    async with streaming(cluster) as events:
        assert text_in(await events.rest()) == TEXT
    assert [request.prefill for request in decode.got(DecodeRequest)] == [lost, None]
    assert cluster.gateway.fleet.registry.state_of(prefill.incarnation)  # it lives: it answered its ping
    assert cluster.metrics.value("kvferry_replacement_total", reason="prefill_lost") == 1


@pytest.mark.parametrize("reason", ["preempted", "draining", "expired"])
async def test_ends_that_are_nobodys_fault_place_again_without_limit(cluster: Cluster, reason: Any) -> None:
    worker = await cluster.worker("decode", "decode-0")

    def one_more(work: Work) -> None:
        index = len(work.generated) // 4
        if index < 8:
            worker.publish(work, [(index, TOKENS[index])], (reason, index + 1))
        else:
            worker.say(work, TOKENS)

    worker.accepted = one_more
    async with streaming(cluster) as events:
        assert text_in(await events.rest()) == TEXT
    assert len({work.attempt for work in worker.works}) == 9
    assert cluster.metrics.value("kvferry_replacement_total", reason=reason) == 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("reason", ["transfer_failed", "prefill_lost", "error"])
async def test_the_third_failure_ends_the_request_in_a_clear_error(cluster: Cluster, stream: bool, reason: Any) -> None:
    worker = await cluster.worker("decode", "decode-0")

    def fail(work: Work) -> None:
        index = len(work.generated) // 4
        worker.publish(work, [(index, TOKENS[index])])
        # Later than the acceptance: before it, a stream's error would still be a 503.
        asyncio.get_running_loop().call_later(0.02, worker.publish, work, (), (reason, index + 1))

    worker.accepted = fail
    response = await cluster.client.post("/v1/completions", json=completion(stream=stream))
    assert len(worker.works) == 3
    if stream:
        assert response.status_code == 200
        events = response.text.strip().split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert '"code":"worker_failed"' in events[-2]
    else:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "worker_failed"


async def test_two_tokens_for_one_index_are_caught_and_the_request_goes_on_elsewhere(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = lambda work: None
    async with streaming(cluster) as events:
        work = (await decode.wait_for(DecodeRequest)).work
        prefill.publish(work, [(0, TOKENS[0])])
        assert await read(events, 1) == TEXT[0]
        decode.accepted = says_all(decode)
        decode.publish(work, [(0, TOKENS[0] + 1), (1, 9), (2, 9)])
        assert text_in(await events.rest()) == TEXT[1:]
    assert cluster.metrics.value("kvferry_token_mismatch_total") == 1
    assert cluster.metrics.value("kvferry_replacement_total", reason="token_mismatch") == 1


async def test_a_token_that_ends_the_sequence_is_enough_when_the_worker_dies_before_its_end(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, len(TOKENS))
    async with streaming(cluster) as events:
        await read(events, len(TEXT))
        await worker.exit("killed")
        rest = await events.rest()
    assert rest[-1]["choices"][0]["finish_reason"] == "stop"
    assert len(worker.works) == 1


async def test_token_0_that_is_the_last_one_ends_at_prefill_and_cancels_decode(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    prefill.accepted = lambda work: prefill.publish(work, [(0, EOS)], ("stop", 1))
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert response.json()["usage"]["completion_tokens"] == 1
    assert (await decode.wait_for(Cancel)).attempt == decode.works[0].attempt
    assert (await prefill.wait_for(EndAck)).stream_ids == (prefill.works[0].stream_id,)


async def test_without_prefill_workers_decode_computes_the_prompt(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = says_all(decode)
    prefill.state = "draining"
    await prefill.beat()
    response = await cluster.client.post("/v1/completions", json=completion())
    assert response.json()["choices"][0]["text"] == TEXT
    assert decode.got(DecodeRequest)[0].prefill is None
    assert not prefill.works


async def test_a_short_prompt_is_prefilled_on_decode(tmp_path: Path) -> None:
    async with Cluster(tmp_path, local_prefill_threshold=10) as cluster:
        prefill, decode = await cluster.pair()
        decode.accepted = says_all(decode)
        await cluster.client.post("/v1/completions", json=completion("x" * 9))
        assert not prefill.works
        await cluster.client.post("/v1/completions", json=completion("x" * 10))
        assert len(prefill.works) == 1


# -- waiting ---------------------------------------------------------------------------------------------------


async def test_without_another_worker_the_stream_waits_with_comments_for_the_restart(tmp_path: Path) -> None:
    async with Cluster(tmp_path, sse_comment_interval=0.2) as cluster:
        first = await cluster.worker("decode", "decode-0")
        first.accepted = says(first, 5)
        async with streaming(cluster) as events:
            await read(events, 5)
            await first.exit("crashed")
            rest = asyncio.create_task(events.rest())
            async with asyncio.timeout(PATIENCE_S):
                while events.comments < 2:
                    await asyncio.sleep(0.01)
            await cluster.worker("decode", "decode-0", says_all)
            assert text_in(await rest) == TEXT[5:]


async def test_the_wait_for_a_restart_ends_in_an_error(tmp_path: Path) -> None:
    async with Cluster(tmp_path, replace_wait=0.3) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        worker.accepted = says(worker, 5)
        async with streaming(cluster) as events:
            await read(events, 5)
            await worker.exit("killed")
            rest = await events.rest()
        assert rest[-1]["error"]["code"] == "no_worker"


async def test_a_request_has_a_deadline(tmp_path: Path) -> None:
    async with Cluster(tmp_path, request_deadline=0.3) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        response = await cluster.client.post("/v1/completions", json=completion())
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "deadline_exceeded"
        work = worker.works[0]
        assert work.deadline is not None
        assert 0 < work.deadline <= 0.3
        assert (await worker.wait_for(Cancel)).attempt == work.attempt


async def test_a_request_under_which_two_workers_crashed_runs_alone_and_a_third_crash_ends_it(cluster: Cluster) -> None:
    workers = [await cluster.worker("decode", f"decode-{number}") for number in range(4)]
    for worker in workers:
        worker.accepted = lambda work: None
    victims: list[ScriptedWorker] = []
    async with asyncio.TaskGroup() as group:
        answer = group.create_task(cluster.client.post("/v1/completions", json=completion()))
        for number in range(3):
            async with asyncio.timeout(PATIENCE_S):
                while sum(len(worker.works) for worker in workers) <= number:
                    await asyncio.sleep(0.005)
            victim = next(worker for worker in workers if worker.works and worker not in victims)
            victims.append(victim)
            await victim.exit("crashed")
    assert [victim.works[0].alone for victim in victims] == [False, False, True]
    assert answer.result().status_code == 503


async def test_killing_workers_from_outside_isolates_nobody(tmp_path: Path) -> None:
    async with Cluster(tmp_path, failure_budget=5) as cluster:
        for number in range(3):
            worker = await cluster.worker("decode", f"decode-{number}")
            worker.accepted = lambda work: None
        async with asyncio.TaskGroup() as group:
            answer = group.create_task(cluster.client.post("/v1/completions", json=completion()))
            seen: list[Work] = []
            for _ in range(3):
                async with asyncio.timeout(PATIENCE_S):
                    while not (fresh := [w for w in cluster.workers.values() if w.works and not w.frozen]):
                        await asyncio.sleep(0.005)
                seen.append(fresh[0].works[0])
                await fresh[0].exit("killed")
            last = await cluster.speaker(TEXT)
            assert last is not None
        assert answer.result().json()["choices"][0]["text"] == TEXT
        assert not any(work.alone for work in [*seen, *last.works])


# -- the gateway's own word ------------------------------------------------------------------------------------


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


async def test_a_bus_outage_is_a_pause_and_requests_meanwhile_are_refused(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = says(worker, 5)
    async with streaming(cluster) as events:
        await read(events, 5)
        cluster.broker.cut(cluster.bus)
        response = await cluster.client.post("/v1/completions", json=completion())
        assert response.status_code == 503
        cluster.broker.heal(cluster.bus)
        async with asyncio.timeout(PATIENCE_S):
            while not cluster.bus.connected:
                await asyncio.sleep(0.01)
        worker.say(worker.works[0], TOKENS)
        assert text_in(await events.rest()) == TEXT[5:]
    assert len(worker.got(DecodeRequest)) == 1, "nobody was judged gone"


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
