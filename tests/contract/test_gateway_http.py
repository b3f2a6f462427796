"""The HTTP API as clients see it: the real application on a real socket, scripted workers behind it."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import httpx
import pytest
from gateway_answers import ANSWER, error_of, post, raw
from msgspec.structs import replace
from openai import AsyncOpenAI, BadRequestError
from scripted_worker import EOS, MODEL, Cluster, Events, chat, completion, text_in, tokens_of

from kvferry.wire.fields import unpack_tokens
from kvferry.wire.orders import Cancel
from kvferry.wire.work import DecodeRequest, PrefillRequest, Work

pytestmark = pytest.mark.usefixtures("no_leaks")


# -- answers ---------------------------------------------------------------------------------------------------


async def test_the_openai_client_gets_the_same_text_streamed_and_not(serving: Cluster) -> None:
    async with AsyncOpenAI(base_url=f"{serving.url}/v1", api_key="unused", max_retries=0) as client:
        asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
        whole = await client.chat.completions.create(**asked)
        stream: Any = await client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
        assert whole.choices[0].message.content == ANSWER
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
        assert chunks[0].choices[0].delta.role == "assistant"
        assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "stop"
        assert chunks[-1].usage.model_dump() == whole.usage.model_dump()  # type: ignore[union-attr]
        text = await client.completions.create(model=MODEL, prompt="hi", max_tokens=64)
        assert text.choices[0].text == ANSWER
        pieces: Any = await client.completions.create(model=MODEL, prompt="hi", max_tokens=64, stream=True)
        assert "".join([piece.choices[0].text async for piece in pieces]) == ANSWER
        assert [model.id async for model in client.models.list()] == [MODEL]
        with pytest.raises(BadRequestError) as refused:
            await client.chat.completions.create(**asked, n=129)
        assert refused.value.param == "n"


async def test_a_stream_has_the_headers_of_server_sent_events_and_ends_with_done(serving: Cluster) -> None:
    response = await post(serving, "/v1/completions", completion(stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["transfer-encoding"] == "chunked"
    assert response.text.endswith("data: [DONE]\n\n")
    assert response.text.count("data: [DONE]") == 1
    # One event per visible character: these tokens are bytes, and the emoji has four of them.
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    assert len([event for event in events if event["choices"][0]["text"]]) == len(ANSWER)
    assert text_in(events) == ANSWER
    assert len({event["id"] for event in events}) == 1
    assert [event["choices"][0]["finish_reason"] for event in events[-2:]] == [None, "stop"]


@pytest.mark.parametrize("fields", [{}, {"return_token_ids": True}])
async def test_a_chats_first_event_comes_with_its_first_token(cluster: Cluster, fields: dict[str, Any]) -> None:
    """Load generators take its coming for the time to the first token."""
    worker = await cluster.worker("decode", "decode-0")
    asked = chat(stream=True, **fields)
    async with cluster.client.stream("POST", "/v1/chat/completions", json=asked) as response:
        events = Events(response)
        first = asyncio.ensure_future(events.next())
        work = (await worker.wait_for(DecodeRequest)).work
        await asyncio.sleep(0.2)
        assert not first.done()
        worker.say(work, [*tokens_of("ab"), EOS])
        assert (await first)["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert text_in(await events.rest()) == "ab"


async def test_usage_counts_prompt_generated_and_cached_tokens(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")

    def answer(work: Work) -> None:
        worker.publish(work, cached=3)
        worker.say(work, [*tokens_of("abc"), EOS])

    worker.accepted = answer
    expected = {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    whole = await post(cluster, "/v1/completions", completion("hello"))
    assert whole.json()["usage"] == expected
    asked = completion("hello", stream=True, stream_options={"include_usage": True})
    async with cluster.client.stream("POST", "/v1/completions", json=asked) as response:
        events = await Events(response).rest()
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == expected
    assert all(event["usage"] is None for event in events[:-1])


async def test_without_include_usage_no_event_has_usage(serving: Cluster) -> None:
    async with serving.client.stream("POST", "/v1/completions", json=completion(stream=True)) as response:
        events = await Events(response).rest()
    assert not any("usage" in event for event in events)


@pytest.mark.parametrize("include_usage", [True, False])
@pytest.mark.parametrize(
    ("path", "asked"), [("/v1/completions", completion("hello")), ("/v1/chat/completions", chat())]
)
async def test_continuous_usage_stats_count_in_each_event(
    serving: Cluster, path: str, asked: dict[str, Any], include_usage: bool
) -> None:
    usage = (await post(serving, path, asked)).json()["usage"]
    options = {"include_usage": include_usage, "continuous_usage_stats": True}
    body = asked | {"stream": True, "stream_options": options, "n": 2}
    async with serving.client.stream("POST", path, json=body) as response:
        events = await Events(response).rest()
    for index in range(2):
        of_choice = [event for event in events if event["choices"] and event["choices"][0]["index"] == index]
        counts = [event["usage"]["completion_tokens"] for event in of_choice]
        assert counts == sorted(counts)
        assert counts[-1] == usage["completion_tokens"]
        assert {event["usage"]["prompt_tokens"] for event in of_choice} == {usage["prompt_tokens"]}
        if path == "/v1/chat/completions":
            assert counts[0] == 0  # the role comes before any token
        assert text_in(of_choice) == ANSWER
    assert (events[-1]["choices"] == []) is include_usage


async def test_max_tokens_ends_with_length(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = lambda work: worker.say(work, tokens_of("abcd"), reason="length")
    response = await post(cluster, "/v1/chat/completions", chat(max_completion_tokens=4, max_tokens=9))
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert worker.works[0].sampling.max_tokens == 4


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        ("end", "Grüße 😀, "),
        ([", e", "zzz"], "Grüße 😀"),
        ("😀", "Grüße "),  # four tokens
        ("ße 😀", "Grü"),  # begins and ends inside characters of several tokens
        ("Grüße 😀, end.!", ANSWER),  # held back to the very end, and never complete
        (["nothing"], ANSWER),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_work_across_tokens_and_characters(
    serving: Cluster, stops: Any, text: str, stream: bool
) -> None:
    response = await post(serving, "/v1/completions", completion(stop=stops, stream=stream))
    if stream:
        events = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        assert text_in(events) == text
        assert events[-1]["choices"][0]["finish_reason"] == "stop"
    else:
        assert response.json()["choices"][0]["text"] == text
        assert response.json()["choices"][0]["finish_reason"] == "stop"


async def test_what_a_worker_says_beyond_max_tokens_is_not_taken(cluster: Cluster) -> None:
    worker = await cluster.worker("decode", "decode-0")
    worker.accepted = lambda work: worker.say(work, [*tokens_of("abcdef"), EOS])
    response = await post(cluster, "/v1/completions", completion(max_tokens=3))
    assert response.json()["choices"][0] == {
        "index": 0, "text": "abc", "logprobs": None, "finish_reason": "length",
    }  # fmt: skip


async def test_after_a_stop_string_the_worker_is_cancelled_and_usage_counts_what_was_delivered(
    cluster: Cluster,
) -> None:
    worker = await cluster.worker("decode", "decode-0")

    def go_on(work: Work) -> None:
        worker.publish(work, list(enumerate(tokens_of("one two three"))))  # in one batch, and no end

    worker.accepted = go_on
    response = await post(cluster, "/v1/completions", completion(stop="two"))
    assert response.json()["choices"][0]["text"] == "one "
    assert response.json()["usage"]["completion_tokens"] == len("one two")
    cancel = await worker.wait_for(Cancel)
    assert (cancel.ticket, cancel.attempt) == worker.works[0].key


# -- what reaches the workers ----------------------------------------------------------------------------------


async def test_sampling_fields_reach_the_worker_and_the_rest_comes_from_the_model(cluster: Cluster) -> None:
    worker = await cluster.speaker("x")
    fields = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -1, "ignore_eos": True}
    await post(cluster, "/v1/completions", completion(**fields))
    sampling = worker.works[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.25, 7, 0.125)
    assert sampling.ignore_eos
    assert sampling.seed == 2**64 - 1
    bare = {"model": MODEL, "prompt": "hello"}
    await post(cluster, "/v1/completions", bare)
    await post(cluster, "/v1/completions", bare)
    first, second = worker.works[1].sampling, worker.works[2].sampling
    assert (first.temperature, first.top_p, first.top_k, first.min_p, first.max_tokens) == (1.0, 1.0, 0, 0.0, 16)
    assert first.seed != second.seed, "requests without a seed differ"


async def test_penalties_reach_the_worker_and_are_neutral_unless_given(cluster: Cluster) -> None:
    worker = await cluster.speaker("x")
    fields = {"presence_penalty": -2, "frequency_penalty": 0.5, "repetition_penalty": 1.25}
    for path, body in (("/v1/completions", completion()), ("/v1/chat/completions", chat())):
        assert (await post(cluster, path, body | fields)).status_code == 200
        await post(cluster, path, body)
        given, bare = (work.sampling for work in worker.works[-2:])
        assert (given.presence_penalty, given.frequency_penalty, given.repetition_penalty) == (-2, 0.5, 1.25)
        assert given.penalised
        assert not bare.penalised


async def test_prefill_and_decode_are_asked_with_the_same_ticket_and_know_of_each_other(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    decode.accepted = lambda work: decode.say(work, [EOS])
    await post(cluster, "/v1/chat/completions", chat("ab"))
    to_prefill, to_decode = await prefill.wait_for(PrefillRequest), await decode.wait_for(DecodeRequest)
    fleet = cluster.gateway.fleet
    assert to_prefill.work == replace(to_decode.work, gateway=fleet.mail_from("prefill"))
    assert to_decode.prefill == prefill.record.address
    work = to_decode.work
    assert unpack_tokens(work.prompt).tolist() == tokens_of("user:ab\nassistant:")
    assert work.generated == b""
    assert work.gateway == fleet.mail_from("decode")
    assert work.sampling.max_tokens == 256 - len(tokens_of("user:ab\nassistant:"))


async def test_a_prompt_may_be_a_list_of_token_ids(cluster: Cluster) -> None:
    worker = await cluster.speaker("x")
    response = await post(cluster, "/v1/completions", completion() | {"prompt": [5, 6, 7]})
    assert response.status_code == 200
    assert unpack_tokens(worker.works[0].prompt).tolist() == [5, 6, 7]


async def test_text_parts_are_joined_and_labels_change_nothing(cluster: Cluster) -> None:
    worker = await cluster.speaker("x")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = chat() | {"messages": [{"role": "user", "content": parts}], "user": "me", "metadata": {"k": "v"}}
    assert (await post(cluster, "/v1/chat/completions", body)).status_code == 200
    assert unpack_tokens(worker.works[0].prompt).tolist() == tokens_of("user:a\nb\nassistant:")


async def test_a_long_prompt_is_tokenised_off_the_loop_to_the_same_tokens(tmp_path: Path) -> None:
    async with Cluster(tmp_path, model_options={"max_context": 8192}) as cluster:
        worker = await cluster.speaker("x", max_model_len=8192, num_blocks=1024)
        assert (await post(cluster, "/v1/completions", completion("ab" * 3000))).status_code == 200
        assert unpack_tokens(worker.works[0].prompt).tolist() == tokens_of("ab" * 3000)


# -- connections -----------------------------------------------------------------------------------------------


async def test_garbage_and_endless_heads_are_refused_and_disturb_nobody(serving: Cluster) -> None:
    garbage = await raw(serving, b"\x16\x03\x01\x02\x00 garbage\r\n\r\n")
    assert garbage.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"invalid_http"' in garbage
    endless = await raw(serving, b"GET /health HTTP/1.1\r\nx: ", b"y" * 100_000)
    assert endless.startswith(b"HTTP/1.1 431 ")
    assert (await post(serving, "/v1/completions", completion())).json()["choices"][0]["text"] == ANSWER


async def test_one_connection_serves_request_after_request_and_requests_sent_ahead(serving: Cluster) -> None:
    body = json.dumps(completion(stream=True)).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n" % len(body)
    last = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    answer = await raw(serving, head + b"\r\n" + body + head + b"\r\n" + body + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert answer.count(b"data: [DONE]") == 2
    assert answer.endswith(b'{"status":"ok"}')


async def test_an_http_1_0_client_gets_its_stream(serving: Cluster) -> None:
    body = json.dumps(completion(stream=True)).encode()
    answer = await raw(serving, b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
    assert answer.count(b"data: [DONE]") == 1


# -- keys, origins, labels -------------------------------------------------------------------------------------


async def test_api_keys_guard_the_api_and_are_read_again_when_the_file_changes(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# comment\n\nalpha\nbeta\n")
    async with Cluster(tmp_path, api_key_file=keys) as cluster:
        worker = await cluster.speaker("x")
        for headers in ({}, {"authorization": "Bearer gamma"}, {"authorization": "Basic alpha"}):
            response = await post(cluster, "/v1/completions", completion(), **headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert (await cluster.client.get("/v1/cluster", headers=headers)).status_code == 401
            assert (await cluster.client.get("/v1/models", headers=headers)).status_code == 401
        assert (await cluster.client.get("/health")).status_code == 200
        assert (await cluster.client.get("/metrics")).status_code == 200
        for key in ("alpha", "beta", "alpha"):
            response = await post(cluster, "/v1/completions", completion(), authorization=f"Bearer {key}")
            assert response.status_code == 200
        salts = [work.salt for work in worker.works]
        assert salts[0] == salts[2] != salts[1], "each key has a prefix cache of its own"
        assert len(salts[0]) == 32
        keys.write_text("gamma\n")
        os.utime(keys, (1, 1))
        assert cluster.gateway.keys is not None
        cluster.gateway.keys.refresh()
        assert (await post(cluster, "/v1/completions", completion(), authorization="Bearer gamma")).status_code == 200
        assert (await post(cluster, "/v1/completions", completion(), authorization="Bearer alpha")).status_code == 401
        keys.unlink()
        cluster.gateway.keys.refresh()
        assert (await post(cluster, "/v1/completions", completion(), authorization="Bearer gamma")).status_code == 200


async def test_pages_of_allowed_origins_may_call(tmp_path: Path) -> None:
    async with Cluster(tmp_path, cors_origins=("https://a.example",)) as cluster:
        await cluster.speaker("x")
        origin = {"origin": "https://a.example"}
        preflight = await cluster.client.options(
            "/v1/chat/completions",
            headers={**origin, "access-control-request-headers": "authorization, content-type"},
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://a.example"
        assert preflight.headers["access-control-allow-headers"] == "authorization, content-type"
        assert "POST" in preflight.headers["access-control-allow-methods"]
        for body in (completion(), completion(stream=True), completion(max_tokens=0)):
            response = await post(cluster, "/v1/completions", body, **origin)
            assert response.headers["access-control-allow-origin"] == "https://a.example"
        stranger = await post(cluster, "/v1/completions", completion(), origin="https://b.example")
        assert "access-control-allow-origin" not in stranger.headers
        assert stranger.headers["vary"] == "origin"


async def test_a_request_id_is_returned_and_only_a_label(serving: Cluster) -> None:
    worker = next(iter(serving.workers.values()))
    response = await post(serving, "/v1/completions", completion(), **{"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == "mine-1"
    assert worker.works[-1].request_id == "mine-1"
    stream = await post(serving, "/v1/completions", completion(stream=True), **{"x-request-id": "mine-1"})
    assert stream.headers["x-request-id"] == "mine-1"
    assert worker.works[-1].ticket != worker.works[-2].ticket
    for bad in ("has space", "x" * 200):
        response = await post(serving, "/v1/completions", completion(), **{"x-request-id": bad})
        assert response.headers["x-request-id"] not in ("", bad)


async def test_the_cluster_lists_each_worker_to_this_machine_alone(serving: Cluster) -> None:
    listed = (await serving.client.get("/v1/cluster")).json()
    assert [worker["role"] for worker in listed["workers"]] == ["decode"]
    worker = listed["workers"][0]
    assert {"name", "pid", "model", "incarnation", "transport", "address", "load", "state"} <= set(worker)
    assert worker["incarnation"] == f"{1000:016x}"
    transport = httpx.ASGITransport(serving.gateway.app, client=("192.0.2.7", 5))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as stranger:
        assert error_of(await stranger.get("/v1/cluster"), 403)["code"] == "permission_denied"
        assert (await stranger.get("/v1/models")).status_code == 200


async def test_any_asgi_server_can_serve_the_application(serving: Cluster) -> None:
    transport = httpx.ASGITransport(serving.gateway.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        whole = await client.post("/v1/completions", json=completion())
        assert whole.json()["choices"][0]["text"] == ANSWER
        stream = await client.post("/v1/completions", json=completion(stream=True))
        events = [json.loads(line[6:]) for line in stream.text.splitlines() if line.startswith("data: {")]
        assert text_in(events) == ANSWER


async def test_metrics_count_requests_by_outcome_and_tokens(serving: Cluster) -> None:
    await post(serving, "/v1/completions", completion())
    await post(serving, "/v1/completions", completion(stream=True))
    await post(serving, "/v1/completions", completion(max_tokens=0))
    metrics = serving.metrics
    assert metrics.value("kvferry_request_total", route="text", outcome="ok") == 2
    assert metrics.value("kvferry_request_total", route="text", outcome="invalid_value") == 1
    assert metrics.value("kvferry_generated_token_total") == 2 * (len(ANSWER.encode()) + 1)
    assert metrics.value("kvferry_prompt_token_total") == 2 * len("hello")
    assert metrics.value("kvferry_ttft_seconds_count") == 2
    assert metrics.value("kvferry_live_requests") == 0
    shown = (await serving.client.get("/metrics")).text
    assert 'kvferry_placement_total{kind="local",model="tiny"} 2.0' in shown
    assert 'kvferry_itl_seconds_bucket{le="+Inf",model="tiny"}' in shown
