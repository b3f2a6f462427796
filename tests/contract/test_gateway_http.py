"""The HTTP API as clients see it: the real application on a real socket, scripted workers behind it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI, BadRequestError
from scripted_worker import EOS, MODEL, Cluster, Events, chat, completion, text_in, tokens_of

from kvferry.text.stop import MAX_STOP_STRINGS
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.orders import Cancel
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, Work
from kvferry_gateway.body import NEUTRAL
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest

pytestmark = pytest.mark.usefixtures("no_leaks")

ANSWER = "Grüße 😀, end."


@pytest.fixture
async def cluster(no_leaks: None, tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
async def serving(cluster: Cluster) -> Cluster:
    """A decode worker that gives the same answer to everything."""
    await cluster.speaker(ANSWER)
    return cluster


async def post(cluster: Cluster, path: str, body: Any, **headers: str) -> httpx.Response:
    return await cluster.client.post(path, json=body, headers=headers)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


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


# -- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b'"text"', b"nul", b'{"model": NaN}', b"\xff\xfe", b'{"model": "\xff"}', b"[" * 100_000],
)
async def test_a_body_that_is_no_json_object_is_refused(serving: Cluster, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert error_of(await serving.client.post(path, content=body), 400)["code"] == "invalid_json"


BAD_COMMON = [
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"frequency_penalty": "1"}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 101}, "repetition_penalty"),
    ({"seed": "x"}, "seed"),
    ({"seed": 1 << 63}, "seed"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"nope": 1}}, "stream_options.nope"),
    ({"stop": ""}, "stop"),
    ({"stop": [""]}, "stop[0]"),
    ({"stop": ["x"] * 10_000}, "stop"),
    ({"stop": "x" * 1000}, "stop"),
    ({"stop": 3}, "stop"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"257": 1}}, "logit_bias"),
    ({"logit_bias": [[5, 1]]}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": [-5]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [257]}, "stop_token_ids"),
    ({"bad_words": ["ab"]}, "bad_words"),
    ({"bad_words": [""]}, "bad_words[0]"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 300}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"unknown_field": 1}, "unknown_field"),
    ({"model": 3}, "model"),
    ({"user": 3}, "user"),
    ({"metadata": {"k": 1}}, "metadata.k"),
]
BAD_CHAT = [
    *BAD_COMMON,
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "wizard", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "a", "color": "red"}]}, "messages[0].color"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"prompt": "hi"}, "prompt"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"best_of": 1}, "best_of"),
]
BAD_TEXT = [
    *BAD_COMMON,
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a", 2]}, "prompt[1]"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": ["a"] * 65, "n": 2}, "n"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [257]}, "prompt"),
    ({"prompt": 3}, "prompt"),
    ({"messages": []}, "messages"),
    ({"echo": 1}, "echo"),
    ({"echo": True, "logprobs": 21}, "logprobs"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2, "stream": True}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 129}, "best_of"),
    ({"best_of": 65, "prompt": ["a", "b"]}, "best_of"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_CHAT, ids=lambda value: str(value)[:40])
async def test_a_bad_chat_field_is_refused_by_name(cluster: Cluster, fields: Any, param: str) -> None:
    error = error_of(await post(cluster, "/v1/chat/completions", chat() | fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(("fields", "param"), BAD_TEXT, ids=lambda value: str(value)[:40])
async def test_a_bad_completion_field_is_refused_by_name(cluster: Cluster, fields: Any, param: str) -> None:
    error = error_of(await post(cluster, "/v1/completions", completion() | fields), 400)
    assert error["param"] == param


async def test_a_missing_field_is_named(cluster: Cluster) -> None:
    body = chat()
    del body["messages"]
    error = error_of(await post(cluster, "/v1/chat/completions", body), 400)
    assert (error["param"], error["code"]) == ("messages", "missing_required_parameter")


NEUTRAL_VALUES: dict[str, Any] = {
    "n": 1, "length_penalty": 1,
    "logit_bias": {}, "min_tokens": 0, "stop_token_ids": [], "bad_words": [], "skip_special_tokens": True,
    "spaces_between_special_tokens": True, "include_stop_str_in_output": False, "use_beam_search": False,
    "response_format": {"type": "text"}, "priority": 0, "return_token_ids": False, "logprobs": False,
    "top_logprobs": 0, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "functions": [],
    "function_call": "none", "modalities": ["text"], "service_tier": "auto", "store": False, "echo": False,
    "add_generation_prompt": True, "continue_final_message": False, "chat_template_kwargs": {}, "best_of": 1,
    "suffix": "",
}  # fmt: skip


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
async def test_every_field_that_is_not_built_is_accepted_where_it_does_nothing_and_refused_otherwise(
    serving: Cluster, kind: Any
) -> None:
    path, body = ("/v1/chat/completions", chat()) if kind is ChatRequest else ("/v1/completions", completion())
    for field in NEUTRAL[kind]:
        neutral = NEUTRAL_VALUES.get(field, kind is CompletionRequest)  # add_special_tokens differs by route
        for value in (neutral, None):
            response = await post(serving, path, body | {field: value})
            assert response.status_code == 200, (field, value, response.text)
        assert error_of(await post(serving, path, body | {field: "no such value"}), 400)["param"] == field
    built = set(kind.model_fields)
    assert not built & set(NEUTRAL[kind]), "a field is built or it is not"


async def test_a_lone_surrogate_is_refused(cluster: Cluster) -> None:
    body = json.dumps(completion()).replace("hello", "a\\ud800").encode()
    assert error_of(await cluster.client.post("/v1/completions", content=body), 400)


async def test_as_many_stop_strings_as_the_limit_are_taken(serving: Cluster) -> None:
    stops = [f"never {number}" for number in range(MAX_STOP_STRINGS)]
    assert (await post(serving, "/v1/completions", completion(stop=stops))).status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", completion("x" * 256, max_tokens=1), "prompt"),
        ("/v1/completions", completion("x" * 200, max_tokens=57), "max_tokens"),
        ("/v1/chat/completions", chat("x" * 256), "messages"),
        ("/v1/chat/completions", chat("x", max_completion_tokens=256), "max_completion_tokens"),
    ],
)
async def test_what_exceeds_the_context_is_refused(serving: Cluster, path: str, body: Any, param: str) -> None:
    error = error_of(await post(serving, path, body), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


async def test_what_just_fits_the_context_is_served(serving: Cluster) -> None:
    assert (await post(serving, "/v1/completions", completion("x" * 200, max_tokens=56))).status_code == 200
    assert (await post(serving, "/v1/completions", completion("x" * 255, max_tokens=1))).status_code == 200


async def test_the_context_is_what_the_workers_can_hold(cluster: Cluster) -> None:
    await cluster.speaker("x", num_blocks=4, block_size=16)
    assert (await post(cluster, "/v1/completions", completion("x" * 32, max_tokens=32))).status_code == 200
    error = error_of(await post(cluster, "/v1/completions", completion("x" * 32, max_tokens=33)), 400)
    assert error["code"] == "context_length_exceeded"
    listed = (await cluster.client.get("/v1/models")).json()["data"][0]
    assert listed["max_model_len"] == 64


async def test_an_unknown_model_is_404(serving: Cluster) -> None:
    error = error_of(await post(serving, "/v1/chat/completions", chat() | {"model": "gpt-9"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert error_of(await serving.client.get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"
    assert (await serving.client.get(f"/v1/models/{MODEL}")).json()["id"] == MODEL


async def test_a_base_model_has_no_chat(tmp_path: Path) -> None:
    async with Cluster(tmp_path, model_options={"chat": False}) as cluster:
        assert error_of(await post(cluster, "/v1/chat/completions", chat()), 400)["param"] == "messages"


async def test_unknown_paths_and_methods_are_answered_in_json(cluster: Cluster) -> None:
    assert error_of(await cluster.client.get("/v1/embeddings"), 404)["code"] == "unknown_url"
    wrong = await cluster.client.get("/v1/chat/completions")
    assert error_of(wrong, 405)["code"] == "method_not_supported"
    assert "POST" in wrong.headers["allow"]
    assert error_of(await cluster.client.post("/v1/models"), 405)
    assert (await cluster.client.head("/v1/models")).status_code == 200


async def test_a_body_over_the_limit_is_413_however_it_comes_and_the_connection_lives_on(tmp_path: Path) -> None:
    async with Cluster(tmp_path, max_body_bytes=1000) as cluster:
        await cluster.speaker("x")
        announced = await cluster.client.post("/v1/completions", content=b"x" * 200_000)
        assert error_of(announced, 413)["code"] == "request_too_large"

        async def endless() -> AsyncIterator[bytes]:
            for _ in range(300):
                yield b"x" * 1000

        assert error_of(await cluster.client.post("/v1/completions", content=endless()), 413)
        assert (await post(cluster, "/v1/completions", completion())).status_code == 200


async def raw(cluster: Cluster, *sent: bytes) -> bytes:
    """What comes back for bytes on a new connection, until it is closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", cluster.http.address[1])
    try:
        for part in sent:
            writer.write(part)
        await writer.drain()
        return await asyncio.wait_for(reader.read(), 60)
    finally:
        writer.close()


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


# -- capacity --------------------------------------------------------------------------------------------------


async def test_without_a_worker_it_is_503_at_once(cluster: Cluster) -> None:
    error = error_of(await post(cluster, "/v1/completions", completion(stream=True)), 503)
    assert error["code"] == "no_worker"
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
    decode.answer = lambda work: answers.append(work)  # keeps silent, twice
    prefill.accepted = lambda work: prefill.publish(work, [(0, tokens_of("x")[0])])
    response = await post(cluster, "/v1/completions", completion(stream=True))
    assert error_of(response, 503), "the first token came, but a refusal could still be told"
    assert len(answers) == 2, "a silent worker is asked once more"
    assert answers[0] == answers[1]


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
