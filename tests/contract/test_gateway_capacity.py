"""What clients are told when there is no room: no worker, full workers, a full gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from gateway_answers import error_of, post
from scripted_worker import EOS, Cluster, completion, tokens_of

from kvferry.runtime import now
from kvferry.wire.work import Accepted, DecodeRequest, Rejected, Work
from kvferry_gateway.flights.patience import NEW_REQUEST_WAIT

pytestmark = pytest.mark.usefixtures("no_leaks")


async def test_without_a_worker_it_is_503_at_once(cluster: Cluster) -> None:
    began = now()
    response = await post(cluster, "/v1/completions", completion(stream=True))
    assert now() - began < NEW_REQUEST_WAIT
    assert error_of(response, 503)["code"] == "no_worker"
    assert response.headers["retry-after"] == "1"
    assert (await cluster.client.get("/ready")).status_code == 503
    assert (await cluster.client.get("/health")).status_code == 200
    await cluster.speaker("x")
    assert (await cluster.client.get("/ready")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("full", ["prefill", "decode"])
async def test_when_all_workers_are_full_it_is_429_with_retry_after(cluster: Cluster, stream: bool, full: str) -> None:
    workers = dict(zip(("prefill", "decode"), await cluster.pair(), strict=True))
    other = await cluster.worker(full, "other")
    for worker in (workers[full], other):
        worker.answer = lambda work: Rejected(work.ticket, work.attempt, "queue_full", 2.5)
    response = await post(cluster, "/v1/completions", completion(stream=stream))
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert response.headers["retry-after"] == "3"
    assert workers[full].works, "both were asked"
    assert other.works


async def test_a_full_worker_is_asked_again_only_after_its_next_heartbeat_or_for_a_more_urgent_request(
    cluster: Cluster,
) -> None:
    """And nobody computes a prompt for it in vain."""
    prefill, decode = await cluster.pair()
    decode.beats = False
    decode.answer = lambda work: Rejected(work.ticket, work.attempt, "queue_full", 2.5)
    for _ in range(3):
        response = await post(cluster, "/v1/completions", completion())
        assert error_of(response, 429)
        assert response.headers["retry-after"] == "3"
        decode.publish(decode.works[0])  # it lives
    assert (len(decode.works), len(prefill.works)) == (1, 1)
    assert error_of(await post(cluster, "/v1/completions", completion(priority=-1)), 429)
    assert (len(decode.works), len(prefill.works)) == (2, 2)
    decode.answer = lambda work: Accepted(work.ticket, work.attempt)
    decode.accepted = lambda work: decode.say(work, [*tokens_of("x"), EOS])
    decode.beats = True
    await asyncio.sleep(0.2)
    assert (await post(cluster, "/v1/completions", completion())).status_code == 200


async def test_a_full_worker_is_passed_over_for_one_that_accepts(cluster: Cluster) -> None:
    full = await cluster.worker("decode", "a-full")
    full.answer = lambda work: Rejected(work.ticket, work.attempt, "queue_full")
    free = await cluster.speaker("yes", running=20)
    for _ in range(2):
        response = await post(cluster, "/v1/completions", completion())
        assert response.json()["choices"][0]["text"] == "yes"
    assert len(free.works) == 2
    assert full.works, "it was asked first at least once"


async def test_more_requests_than_the_gateway_takes_are_refused(tmp_path: Path) -> None:
    async with Cluster(tmp_path, max_requests=1) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        first = asyncio.create_task(post(cluster, "/v1/completions", completion()))
        work = (await worker.wait_for(DecodeRequest)).work
        refused = await post(cluster, "/v1/completions", completion())
        assert error_of(refused, 429)
        assert refused.headers["retry-after"] == "1"
        worker.say(work, [*tokens_of("x"), EOS])
        assert (await first).status_code == 200
        worker.accepted = lambda work: worker.say(work, [EOS])
        assert (await post(cluster, "/v1/completions", completion())).status_code == 200


async def test_nothing_is_written_before_decode_has_accepted(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    answers: list[Work] = []

    def silent_and_then_unwilling(work: Work) -> Rejected | None:
        answers.append(work)
        return None if len(answers) <= 2 else Rejected(work.ticket, work.attempt, "wrong_model")

    decode.answer = silent_and_then_unwilling
    prefill.accepted = lambda work: prefill.publish(work, [(0, tokens_of("x")[0])])
    response = await post(cluster, "/v1/completions", completion(stream=True))
    assert error_of(response, 503), "the first token came, but a refusal could still be told"
    assert len(answers) == 3, "a silent worker is asked once more, and when it may have come back"
    assert answers[0] == answers[1]
