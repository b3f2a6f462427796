"""The API's features with OpenAI's own client, on the real stack: real processes, model, bus and hand-off."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from openai import BadRequestError, OpenAI
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


def test_the_fingerprint_names_the_numerics_of_the_decode_worker(stack: Stack, client: OpenAI) -> None:
    worker = stack.worker("decode-0")
    assert worker is not None
    assert ask(client).system_fingerprint == worker["numerics_id"]
    assert {chunk.system_fingerprint for chunk in ask(client, stream=True)} == {worker["numerics_id"]}
