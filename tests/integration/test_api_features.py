"""What each field of the API does, through a real gateway over real workers on the in-memory planes."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
from api_cluster import BYTES, ApiCluster, api, joined, scenario
from cluster import all_free, settled
from scripted_worker import EOS, text_of, tokens_of
from structlog.testing import capture_logs

from kvferry.engine.memory.runner import scored_continuation
from kvferry.wire.sampling import Sampling

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "The quick brown fox jumps over the lazy dog, twice."


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "memory", "prompt": PROMPT, "max_tokens": 24, "temperature": 0, **fields}


def chat(*messages: tuple[str, str], **fields: Any) -> dict[str, Any]:
    made = [{"role": role, "content": content} for role, content in messages or [("user", PROMPT)]]
    return {"model": "memory", "messages": made, "max_tokens": 24, "temperature": 0, **fields}


def reference(prompt: str, choice: int = 0, **fields: Any) -> list[Any]:
    """What the twin must say: (token, its log-probabilities)."""
    sampling = Sampling(**{"temperature": 0.0, "max_tokens": 24, "num_logprobs": 3, **fields})
    rows = scored_continuation(BYTES, tokens_of(prompt), sampling, choice, sampling.max_tokens)
    end = next((place for place, (token, _) in enumerate(rows) if sampling.is_end(token, frozenset({EOS}))), len(rows))
    return rows[: end + 1]


# -- log-probabilities -----------------------------------------------------------------------------------------


@scenario
async def test_a_chat_has_one_entry_for_each_token_in_the_form_of_openai(cluster: ApiCluster) -> None:
    answer = await cluster.ask(CHAT, chat(logprobs=True, top_logprobs=3, return_token_ids=True))
    choice = answer["choices"][0]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    entries = choice["logprobs"]["content"]
    assert len(entries) == answer["usage"]["completion_tokens"] == len(choice["token_ids"])
    for entry, token in zip(entries, choice["token_ids"], strict=True):
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"}
        assert all(set(top) == {"token", "logprob", "bytes"} for top in entry["top_logprobs"])
        assert entry["bytes"] == ([token - 1] if token != EOS else list(b"<|end|>"))
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["bytes"] == entry["bytes"], "greedy takes the best"
        assert 0 > entry["logprob"] == entry["top_logprobs"][0]["logprob"] >= entry["top_logprobs"][1]["logprob"]
    spelled = bytes(byte for entry in entries for byte in entry["bytes"])
    assert spelled.decode("utf-8", "replace").removesuffix("<|end|>") == choice["message"]["content"]


@scenario
async def test_a_completion_has_columns_in_the_form_of_openai(cluster: ApiCluster) -> None:
    answer = await cluster.ask(TEXT, text(logprobs=3))
    told, shown = answer["choices"][0]["logprobs"], answer["choices"][0]["text"]
    wanted = reference(PROMPT)
    assert set(told) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
    assert told["token_logprobs"] == pytest.approx([row.logprob for _, row in wanted])
    assert [len(top) for top in told["top_logprobs"]] == [3] * len(wanted)
    offset = 0
    for place, (token, _) in enumerate(wanted):
        name = told["tokens"][place]
        if token == EOS:
            assert name == "<|end|>"
        elif token <= 128:
            assert name == chr(token - 1)
        else:
            assert name == f"bytes:\\x{token - 1:02x}", "no text by itself"
        assert told["text_offset"][place] >= offset
        offset = told["text_offset"][place]
        if name in shown and token <= 128 and (place == 0 or wanted[place - 1][0] <= 128):
            assert shown[offset] == name, "where the token's text begins"


@scenario
async def test_a_drawn_token_that_is_not_among_the_best_is_added(cluster: ApiCluster) -> None:
    answer = await cluster.ask(TEXT, text(logprobs=2, logit_bias={"66": 100}))
    told = answer["choices"][0]["logprobs"]
    assert set(told["tokens"]) == {"A"}
    assert all(top["A"] == p for top, p in zip(told["top_logprobs"], told["token_logprobs"], strict=True))
    assert {len(top) for top in told["top_logprobs"]} <= {2, 3}
    assert 3 in {len(top) for top in told["top_logprobs"]}


@scenario
async def test_logprobs_of_zero_tell_the_drawn_token_alone(cluster: ApiCluster) -> None:
    told = (await cluster.ask(TEXT, text(logprobs=0)))["choices"][0]["logprobs"]
    assert all(list(top) == [name] for top, name in zip(told["top_logprobs"], told["tokens"], strict=True))
    answer = await cluster.ask(CHAT, chat(logprobs=True))
    assert all(entry["top_logprobs"] == [] for entry in answer["choices"][0]["logprobs"]["content"])


@scenario
async def test_tokens_of_one_character_come_in_one_event(cluster: ApiCluster) -> None:
    asked = text(max_tokens=48, temperature=1.0, seed=4, ignore_eos=True)
    events = await cluster.ask(TEXT, asked | {"stream": True, "logprobs": 1})
    told = [choice["logprobs"] for event in events for choice in event["choices"] if choice["logprobs"]]
    counts = [len(columns["tokens"]) for columns in told]
    whole = await cluster.ask(TEXT, asked)
    assert sum(counts) == whole["usage"]["completion_tokens"]
    assert max(counts) > 1


# -- what is drawn ---------------------------------------------------------------------------------------------


@scenario
async def test_a_bias_of_100_forces_a_token_and_of_minus_100_bans_it(cluster: ApiCluster) -> None:
    plain = (await cluster.ask(TEXT, text(max_tokens=8)))["choices"][0]["text"]
    forced = await cluster.ask(TEXT, text(max_tokens=8, logit_bias={"67": 100}))
    assert forced["choices"][0]["text"] == "B" * 8
    first = reference(PROMPT)[0][0]
    banned = await cluster.ask(TEXT, text(max_tokens=8, logit_bias={str(first): -100}, return_token_ids=True))
    assert first not in banned["choices"][0]["token_ids"]
    assert banned["choices"][0]["text"] != plain


@scenario
async def test_a_bad_word_is_never_written_and_one_of_several_tokens_is_refused(cluster: ApiCluster) -> None:
    first = next(token for token, _ in reference(PROMPT) if EOS < token <= 128)
    word = chr(first - 1)
    assert word in (await cluster.ask(TEXT, text()))["choices"][0]["text"]
    assert word not in (await cluster.ask(TEXT, text(bad_words=[word])))["choices"][0]["text"]
    error = await cluster.error(TEXT, text(bad_words=[word, "word"]))
    assert (error["param"], error["code"]) == ("bad_words", "unsupported_value")


@scenario
async def test_nothing_ends_a_choice_before_min_tokens(cluster: ApiCluster) -> None:
    stops = list(range(1, 129))
    early = await cluster.ask(TEXT, text(stop_token_ids=stops))
    assert early["usage"]["completion_tokens"] < 12
    late = await cluster.ask(TEXT, text(stop_token_ids=stops, min_tokens=12, return_token_ids=True))
    assert late["usage"]["completion_tokens"] >= 12
    drawn = late["choices"][0]["token_ids"]
    assert not {EOS, *stops} & set(drawn[:12])
    assert late["choices"][0]["finish_reason"] == "stop"
    assert drawn[-1] in stops


@scenario
async def test_a_stop_string_within_min_tokens_does_not_stop(cluster: ApiCluster) -> None:
    bias = {"66": 100}  # A
    stopped = await cluster.ask(TEXT, text(stop="AA", logit_bias=bias))
    assert (stopped["choices"][0]["text"], stopped["usage"]["completion_tokens"]) == ("", 2)
    later = await cluster.ask(TEXT, text(stop="AA", logit_bias=bias, min_tokens=5))
    assert (later["choices"][0]["text"], later["usage"]["completion_tokens"]) == ("A" * 5, 7)


@scenario
async def test_a_stop_token_ends_and_is_shown_only_if_asked_for(cluster: ApiCluster) -> None:
    asked = text(stop_token_ids=[66], logit_bias={"66": 100})
    for stream in (False, True):
        for include in (False, True):
            answer = await cluster.ask(TEXT, asked | {"include_stop_str_in_output": include, "stream": stream})
            if stream:
                shown, reason = joined(answer)[0]["text"], joined(answer)[0]["reason"]
            else:
                shown, reason = answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]
                assert answer["usage"]["completion_tokens"] == 1
            assert (shown, reason) == ("A" if include else "", "stop")


@scenario
async def test_a_stop_string_is_shown_only_if_asked_for(cluster: ApiCluster) -> None:
    asked = text(stop="AAA", logit_bias={"66": 100}, include_stop_str_in_output=True)
    for stream in (False, True):
        answer = await cluster.ask(TEXT, asked | {"stream": stream})
        shown = joined(answer)[0]["text"] if stream else answer["choices"][0]["text"]
        assert shown == "AAA"


@scenario
async def test_special_tokens_are_shown_only_if_asked_for(cluster: ApiCluster) -> None:
    asked = text(ignore_eos=True, logit_bias={str(EOS): 100}, max_tokens=3)
    assert (await cluster.ask(TEXT, asked))["choices"][0]["text"] == ""
    shown = await cluster.ask(TEXT, asked | {"skip_special_tokens": False})
    assert shown["choices"][0]["text"] == "<|end|>" * 3
    ended = await cluster.ask(TEXT, text(logit_bias={str(EOS): 100}, skip_special_tokens=False))
    assert ended["choices"][0]["text"] == "", "the token that ends a text is no part of it"


# -- several choices -------------------------------------------------------------------------------------------


@scenario
async def test_n_choices_differ_by_their_counter_and_share_one_prompt(cluster: ApiCluster) -> None:
    drawn = {"temperature": 1.0, "seed": 9}
    answer = await cluster.ask(TEXT, text(n=4, return_token_ids=True, **drawn))
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    for number, choice in enumerate(answer["choices"]):
        assert choice["token_ids"] == [token for token, _ in reference(PROMPT, number, **drawn)]
    assert len({choice["text"] for choice in answer["choices"]}) == 4
    assert answer["usage"]["prompt_tokens"] == len(PROMPT)
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in answer["choices"])
    cached = cluster.api.fleet.metrics.value("kvferry_cached_token_total")
    assert cached >= 3 * (len(PROMPT) // BYTES.block_size - 1) * BYTES.block_size, "the others found the prompt"


@scenario
async def test_streamed_choices_take_turns(cluster: ApiCluster) -> None:
    events = await cluster.ask(TEXT, text(n=3, temperature=1.0, seed=9, stream=True, ignore_eos=True))
    order = [choice["index"] for event in events for choice in event["choices"]]
    assert set(order) == {0, 1, 2}
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > 10, "one after the other is not together"


@scenario
async def test_prompts_of_a_batch_are_answered_in_their_order(cluster: ApiCluster) -> None:
    prompts = [PROMPT, "b", PROMPT + "c"]
    answer = await cluster.ask(TEXT, text(prompt=prompts, n=2, temperature=1.0, seed=3, return_token_ids=True))
    assert len(answer["choices"]) == 6
    for index, choice in enumerate(answer["choices"]):
        prompt = prompts[index // 2]
        assert choice["prompt_token_ids"] == tokens_of(prompt)
        assert choice["token_ids"] == [t for t, _ in reference(prompt, index % 2, temperature=1.0, seed=3)]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    ids = await cluster.ask(TEXT, text(prompt=[tokens_of(prompt) for prompt in prompts]))
    strings = await cluster.ask(TEXT, text(prompt=prompts))
    assert ids["choices"] == strings["choices"]


def test_choices_count_as_requests() -> None:
    async def test(cluster: ApiCluster) -> None:
        error = await cluster.error(TEXT, text(n=5), 429)
        assert error["code"] == "rate_limit_exceeded"
        assert cluster.api.completions.num_live == 0
        assert len((await cluster.ask(TEXT, text(n=4)))["choices"]) == 4

    api(test, max_requests=4)


@scenario
async def test_many_choices_of_a_prompt_that_fills_half_the_pool_all_come(cluster: ApiCluster) -> None:
    answer = await cluster.ask(TEXT, text(n=8, temperature=1.0, seed=1, prompt=PROMPT * 10))
    assert len(answer["choices"]) == 8


@scenario
async def test_a_client_that_leaves_takes_all_its_choices_with_it(cluster: ApiCluster) -> None:
    body = text(n=3, temperature=1.0, seed=1, stream=True, ignore_eos=True, max_tokens=500)
    await cluster.leave(TEXT, body, lambda: len([s for s in cluster.streams if len(s.tokens) > 2]) == 3)
    await settled(lambda: all_free(*cluster.workers), 1.0)


def test_an_error_ends_the_streams_of_all_choices_once() -> None:
    async def test(cluster: ApiCluster) -> None:
        asked = text(n=2, temperature=1.0, seed=1, ignore_eos=True, max_tokens=500)
        events = await cluster.ask(TEXT, asked | {"stream": True})
        assert [event["error"]["code"] for event in events if "error" in event] == ["deadline_exceeded"]
        assert "error" in events[-1]
        assert {choice["index"] for event in events[:-1] for choice in event["choices"]} == {0, 1}
        assert (await cluster.error(TEXT, asked, 504))["code"] == "deadline_exceeded"

    api(test, request_deadline=1.0)


# -- prompts ---------------------------------------------------------------------------------------------------


@scenario
async def test_a_developer_is_a_system_to_a_template_that_does_not_know_it(cluster: ApiCluster) -> None:
    asked = {"return_token_ids": True}
    one = await cluster.ask(CHAT, chat(("developer", "Be brief."), ("user", "hi"), **asked))
    other = await cluster.ask(CHAT, chat(("system", "Be brief."), ("user", "hi"), **asked))
    assert one["prompt_token_ids"] == other["prompt_token_ids"]


@scenario
async def test_a_final_message_is_continued(cluster: ApiCluster) -> None:
    messages = ("user", "Count."), ("assistant", "one, two, ")
    asked = {"return_token_ids": True, "add_generation_prompt": False}
    open_ended = await cluster.ask(CHAT, chat(*messages, continue_final_message=True, **asked))
    assert text_of(open_ended["prompt_token_ids"]).endswith("assistant:one, two, ")
    closed = await cluster.ask(CHAT, chat(*messages, **asked))
    assert not text_of(closed["prompt_token_ids"]).endswith("one, two, ")


@scenario
async def test_a_prompt_is_truncated_from_its_left(cluster: ApiCluster) -> None:
    asked = {"return_token_ids": True}
    kept = await cluster.ask(TEXT, text(truncate_prompt_tokens=6, **asked))
    assert kept["choices"][0]["prompt_token_ids"] == tokens_of(PROMPT)[-6:]
    assert kept["usage"]["prompt_tokens"] == 6
    whole = await cluster.ask(TEXT, text(truncate_prompt_tokens=-1, **asked))
    assert whole["choices"][0]["prompt_token_ids"] == tokens_of(PROMPT)
    long = await cluster.ask(TEXT, text(prompt=PROMPT * 30, truncate_prompt_tokens=-1, max_tokens=24))
    assert long["usage"]["prompt_tokens"] == BYTES.max_model_len - 24


@scenario
async def test_an_echo_begins_with_the_prompt(cluster: ApiCluster) -> None:
    plain = (await cluster.ask(TEXT, text()))["choices"][0]["text"]
    assert (await cluster.ask(TEXT, text(echo=True)))["choices"][0]["text"] == PROMPT + plain
    by_ids = await cluster.ask(TEXT, text(prompt=tokens_of(PROMPT), echo=True))
    assert by_ids["choices"][0]["text"] == PROMPT + plain
    assert joined(await cluster.ask(TEXT, text(echo=True, stream=True)))[0]["text"] == PROMPT + plain


@scenario
async def test_the_fingerprint_is_the_numerics_id(cluster: ApiCluster) -> None:
    numerics = {worker.runner.numerics_id for worker in cluster.workers}
    answers = [await cluster.ask(TEXT, text()), await cluster.ask(CHAT, chat())]
    answers += await cluster.ask(CHAT, chat(stream=True)) + await cluster.ask(TEXT, text(stream=True, n=2, logprobs=1))
    assert {answer["system_fingerprint"] for answer in answers} == numerics


@scenario
async def test_labels_and_texts_are_not_logged(cluster: ApiCluster) -> None:
    labels = {"user": "label-one", "metadata": {"label-two": "label-three"}, "safety_identifier": "label-four"}
    with capture_logs() as lines:
        answer = await cluster.ask(TEXT, text(prompt="label-five", logprobs=1, echo=False, **labels))
        await cluster.error(TEXT, text(prompt="label-six", bad_words=["label-seven"], **labels))
    assert any("request_id" in line for line in lines), "nothing was logged at all"
    assert "label-" not in repr(lines)
    assert answer["choices"][0]["text"] not in repr(lines)


# -- other routes ----------------------------------------------------------------------------------------------


@scenario
async def test_a_text_is_tokenised_and_comes_back(cluster: ApiCluster) -> None:
    found = await cluster.ask("/tokenize", {"prompt": "Grüße", "return_token_strs": True})
    assert found["tokens"] == tokens_of("Grüße")
    assert found["count"] == 7
    assert found["max_model_len"] == BYTES.max_model_len
    assert len(found["token_strs"]) == 7
    assert await cluster.ask("/detokenize", {"tokens": [*found["tokens"], EOS]}) == {"prompt": "Grüße<|end|>"}
    chatted = await cluster.ask("/tokenize", {"model": "memory", "messages": [{"role": "user", "content": "hi"}]})
    assert text_of(chatted["tokens"]) == "user:hi\nassistant:"
    assert chatted["token_strs"] is None


@scenario
async def test_tokenising_refuses_what_it_does_not_know(cluster: ApiCluster) -> None:
    for path, body, param in (
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "color": 1}, "color"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {}, "tokens"),
    ):
        assert (await cluster.error(path, body))["param"] == param
    assert (await cluster.error("/tokenize", {"model": "x", "prompt": "a"}, 404))["code"] == "model_not_found"


@scenario
async def test_small_routes_answer(cluster: ApiCluster) -> None:
    assert (await cluster.http.get("/ping")).status_code == 200
    assert set((await cluster.http.get("/version")).json()) == {"version"}
    assert (await cluster.http.get("/load")).json() == {"server_load": 0}
    assert (await cluster.http.get("/v1/models/memory")).json()["id"] == "memory"
    for path in ("/v1/embeddings", "/v1/images/generations", "/v1/audio/speech", "/v1/moderations", "/rerank"):
        error = await cluster.error(path, {"model": "memory", "input": "x"}, 404)
        assert error["code"] == "unknown_url"
        assert "generates text" in error["message"]


@scenario
async def test_the_load_is_what_is_under_way(cluster: ApiCluster) -> None:
    asking = asyncio.ensure_future(cluster.ask(TEXT, text(n=3, temperature=1.0, seed=1)))
    await settled(lambda: len(cluster.streams) == 3, 5.0)
    assert (await cluster.http.get("/load")).json() == {"server_load": 3}
    await asking
