"""What the HTTP API refuses, and by which name. The real application on a real socket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from gateway_answers import error_of, post
from scripted_worker import MODEL, Cluster, chat, completion

from kvferry.text.stop import MAX_STOP_STRINGS
from kvferry_gateway.body import NEUTRAL
from kvferry_gateway.requests.openai import ChatRequest, CompletionRequest

pytestmark = pytest.mark.usefixtures("no_leaks")


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
