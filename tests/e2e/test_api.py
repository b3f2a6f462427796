"""The API's features with OpenAI's own client, on the real stack: real processes, model, bus and hand-off."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from openai import BadRequestError, OpenAI
from pydantic import BaseModel, ConfigDict, Field
from stack import Stack

PROMPT = "A list of the rivers of Europe, with the countries that each of them flows through, begins as follows. " * 2


@pytest.fixture
def client(stack: Stack) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{stack.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def complete(client: OpenAI, **fields: Any) -> Any:
    asked = {"model": "smollm2", "prompt": PROMPT, "max_tokens": 12, "temperature": 0, **fields}
    return client.completions.create(**asked)


def ask(client: OpenAI, **fields: Any) -> Any:
    asked = {"model": "smollm2", "max_tokens": 12, "temperature": 0, **fields}
    return client.chat.completions.create(messages=[{"role": "user", "content": PROMPT}], **asked)


def test_log_probabilities_of_a_chat_streamed_and_not(client: OpenAI) -> None:
    choice = ask(client, logprobs=True, top_logprobs=4).choices[0]
    entries = choice.logprobs.content
    spelled = b"".join(bytes(entry.bytes) for entry in entries)
    assert spelled.decode().removesuffix("<|im_end|>") == choice.message.content
    for entry in entries:
        assert entry.logprob == entry.top_logprobs[0].logprob, "greedy takes the best"
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001
        assert len(entry.top_logprobs) == 4
    parts = [c.choices[0].logprobs for c in ask(client, logprobs=True, top_logprobs=4, stream=True) if c.choices]
    assert [entry for part in parts if part is not None for entry in part.content] == entries


def test_log_probabilities_of_a_completion(client: OpenAI) -> None:
    choice = complete(client, logprobs=2).choices[0]
    told = choice.logprobs
    assert "".join(told.tokens).removesuffix("<|im_end|>") == choice.text
    for at, name in zip(told.text_offset, told.tokens, strict=True):
        assert choice.text[at:].startswith(name) or (at == len(choice.text) and name == "<|im_end|>")
    assert all(top[name] == p for top, name, p in zip(told.top_logprobs, told.tokens, told.token_logprobs, strict=True))


def test_a_text_is_scored_as_evaluation_harnesses_ask_and_as_it_was_generated(stack: Stack, client: OpenAI) -> None:
    """What decoding told of its own tokens is, to the bit, what a prefill says of them as a prompt."""
    drawn = complete(client, logprobs=2, max_tokens=24, temperature=1.0, seed=8, extra_body={"return_token_ids": True})
    choice = drawn.choices[0]
    ids = [*choice.prompt_token_ids, *choice.token_ids]
    asked = {"prompt": [ids, ids[:50]], "logprobs": 2, "echo": True}
    for limit in (0, 1):
        told = complete(client, max_tokens=limit, **asked)
        assert told.usage.completion_tokens == 2 * limit
        columns = told.choices[0].logprobs
        assert len(columns.tokens) == len(ids) + limit
        assert columns.token_logprobs[0] is None
        size = len(choice.token_ids)
        scored = columns.token_logprobs[len(ids) - size : len(ids)]
        assert scored == choice.logprobs.token_logprobs
        assert columns.top_logprobs[len(ids) - size : len(ids)] == choice.logprobs.top_logprobs
        assert told.choices[1].logprobs.token_logprobs[:50] == columns.token_logprobs[:50]
    entries = complete(client, prompt=ids, extra_body={"prompt_logprobs": 1}).choices[0].prompt_logprobs
    assert [entry and entry[str(token)]["logprob"] for token, entry in zip(ids, entries, strict=True)] == (
        columns.token_logprobs[: len(ids)]
    )


def test_choices_streamed_and_not(client: OpenAI) -> None:
    drawn = {"n": 3, "temperature": 1.0, "seed": 4}
    complete(client, **drawn)  # from here on the prompt is in every cache
    whole = complete(client, **drawn)
    texts = [choice.text for choice in whole.choices]
    assert len(set(texts)) == 3
    assert whole.usage.completion_tokens <= 36
    assert whole.usage.prompt_tokens == complete(client).usage.prompt_tokens
    shown = {0: "", 1: "", 2: ""}
    for event in complete(client, stream=True, **drawn):
        for choice in event.choices:
            shown[choice.index] += choice.text
    assert list(shown.values()) == texts


def test_biases_bans_and_stops(stack: Stack, client: OpenAI) -> None:
    with stack.http() as http:
        word = http.post("/tokenize", json={"prompt": " the", "add_special_tokens": False}).raise_for_status().json()
    token = str(word["tokens"][0])
    assert word["count"] == 1
    assert complete(client, logit_bias={token: 100}, max_tokens=4).choices[0].text == " the" * 4
    held = complete(client, max_tokens=32, extra_body={"stop_token_ids": [int(token)], "min_tokens": 8})
    assert held.usage.completion_tokens >= 8
    with pytest.raises(BadRequestError) as refused:
        complete(client, extra_body={"bad_words": ["an unlikely single token"]})
    assert refused.value.param == "bad_words"


class Reading(BaseModel):
    model_config = ConfigDict(extra="forbid")
    river: Literal["Rhine", "Danube", "Volga"]
    countries: Annotated[list[Literal["Germany", "Austria", "Russia"]], Field(min_length=1, max_length=3)]
    km: Annotated[int, Field(ge=0, le=9999)]


def test_structured_output_by_openais_own_parser_and_by_vllms_fields(client: OpenAI) -> None:
    asked = {"model": "smollm2", "max_tokens": 300, "temperature": 1.5, "seed": 1}
    messages: Any = [{"role": "user", "content": PROMPT}]
    parsed = client.chat.completions.parse(messages=messages, response_format=Reading, **asked)
    choice = parsed.choices[0]
    assert choice.finish_reason == "stop"
    assert isinstance(choice.message.parsed, Reading)
    schema = {"type": "json_schema", "json_schema": {"name": "reading", "schema": Reading.model_json_schema()}}
    chunks = ask(client, **asked, response_format=schema, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert Reading.model_validate_json(text)
    outputs = {"structured_outputs": {"regex": "(yes|no), because [a-z ]{5,20}\\."}}
    answer = complete(client, max_tokens=60, temperature=1.5, n=3, extra_body=outputs)
    assert all(re.fullmatch("(yes|no), because [a-z ]{5,20}\\.", choice.text) for choice in answer.choices)
    with pytest.raises(BadRequestError) as refused:
        complete(client, extra_body={"structured_outputs": {"regex": "("}})
    assert refused.value.param == "structured_outputs.regex"


def test_the_fingerprint_names_the_numerics_of_the_decode_worker(stack: Stack, client: OpenAI) -> None:
    worker = stack.worker("decode-0")
    assert worker is not None
    assert ask(client).system_fingerprint == worker["numerics_id"]
    assert {chunk.system_fingerprint for chunk in ask(client, stream=True)} == {worker["numerics_id"]}


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_light",
        "description": "Switches the light.",
        "parameters": {
            "type": "object",
            "properties": {"on": {"type": "boolean"}, "room": {"enum": ["kitchen", "hall"]}},
            "required": ["on", "room"],
            "additionalProperties": False,
        },
    },
}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "set_light"}}])
def test_a_demanded_tool_call_validates_streamed_and_not(client: OpenAI, choice: Any) -> None:
    asked = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 64}
    whole = ask(client, **asked).choices[0]
    (call,) = whole.message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert (call.function.name, set(arguments)) == ("set_light", {"on", "room"})
    assert isinstance(arguments["on"], bool)
    assert arguments["room"] in ("kitchen", "hall")
    assert whole.finish_reason == "tool_calls"
    deltas = [d for c in ask(client, stream=True, **asked) for ch in c.choices for d in ch.delta.tool_calls or []]
    assert deltas[0].function.name == "set_light"
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments


def test_a_response_says_what_a_chat_says(client: OpenAI) -> None:
    said = ask(client).choices[0].message.content
    asked: dict[str, Any] = {"model": "smollm2", "input": PROMPT, "max_output_tokens": 12, "temperature": 0}
    assert client.responses.create(**asked).output_text == said
    with client.responses.stream(**asked) as stream:
        shown = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert shown == said
