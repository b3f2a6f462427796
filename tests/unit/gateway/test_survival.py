"""What a client sees when workers fail, and what the workers are told. On a real socket."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from scripted_streams import TEXT, TOKENS, read, says, says_all, streaming
from scripted_worker import EOS, PATIENCE_S, Cluster, ScriptedWorker, completion, text_in

from kvferry.wire.fields import unpack_tokens
from kvferry.wire.orders import Cancel, EndAck, Fence, Ping
from kvferry.wire.work import DecodeRequest, PrefillRequest, Rejected, Work

pytestmark = pytest.mark.usefixtures("no_leaks")


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
