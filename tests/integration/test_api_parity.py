"""Each feature gives the same answer, bit for bit, from one worker, over the hand-off, and after a lost worker.

A row is a feature, a column a way through the cluster. The twin's KV, tokens and log-probabilities depend on every
byte of the context, so an equal answer means equal bytes all the way.
"""

from __future__ import annotations

import asyncio
import functools
from typing import Any, Literal, get_args

import pytest
from api_cluster import ApiCluster, api, joined, timeless
from cluster import settled
from scripted_worker import EOS

from kvferry.engine.memory import MemoryRunner
from kvferry_decode.worker import DecodeWorker
from kvferry_gateway.openai import ChatRequest, CompletionRequest

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "A prompt that is longer than some blocks of the cache are, so that the hand-off has frames to send. "
MAX_TOKENS = 24
Row = dict[str, Any]
Way = Literal["single worker", "pair", "pair with a prefix hit", "local prefill"]
WAYS: tuple[Way, ...] = get_args(Way)[1:]

SCHEMA = {
    "name": "reading",
    "strict": True,
    "schema": {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
        "required": ["ok", "level"],
        "additionalProperties": False,
    },
}

LEVEL = {"type": "object", "properties": {"level": {"enum": ["low", "high"]}}, "required": ["level"]}
TOOLS = [
    {"type": "function", "function": {"name": "set", "parameters": {**LEVEL, "additionalProperties": False}}},
    {"type": "function", "function": {"name": "stop"}},
]
NAMED = {"type": "function", "function": {"name": "set"}}
STRICT = [{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}, TOOLS[1]]
TAG = {"schema": LEVEL, "end": "</f>"}

# One field at least in each row; together they are all fields that change what is generated or told.
BOTH: dict[str, Row] = {
    "greedy": {},
    "temperature": {"temperature": 0.8, "seed": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.5, "seed": 6},
    "top_k": {"temperature": 1.0, "top_k": 3, "seed": 7},
    "min_p": {"temperature": 1.0, "min_p": 0.1, "seed": 8},
    "seed": {"temperature": 1.0, "seed": -1},
    "presence_penalty": {"presence_penalty": 1.5},
    "frequency_penalty": {"frequency_penalty": -1.0},
    "repetition_penalty": {"repetition_penalty": 1.3},
    "logit_bias": {"logit_bias": {"66": 100, "70": -100}},
    "min_tokens": {"min_tokens": 9, "stop_token_ids": list(range(1, 200))},
    "stop_token_ids": {"stop_token_ids": list(range(1, 30))},
    "stop": {"stop": ["y", "gn"]},
    "include_stop_str_in_output": {"stop": ["y", "gn"], "include_stop_str_in_output": True},
    "bad_words": {"bad_words": ["y", "!"]},
    "ignore_eos": {"ignore_eos": True, "logit_bias": {str(EOS): 100}},
    "skip_special_tokens": {"ignore_eos": True, "logit_bias": {str(EOS): 100}, "skip_special_tokens": False},
    "add_special_tokens": {"add_special_tokens": True},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 20},
    "return_token_ids": {"return_token_ids": True},
    "n": {"n": 3, "temperature": 1.0, "seed": 11},
    "response_format": {"response_format": {"type": "json_object"}, "temperature": 1.0, "seed": 4},
    "response_format with a schema": {"response_format": {"type": "json_schema", "json_schema": SCHEMA}},
    "structured_outputs": {"structured_outputs": {"regex": "(ab|cd?){4,9}!"}, "temperature": 1.0, "seed": 12},
    "structured_outputs of n choices": {
        "structured_outputs": {"choice": ["left", "right", "straight on"]},
        "n": 3,
        "temperature": 1.0,
        "seed": 13,
    },
    "structured_outputs and all that bans and biases": {
        "structured_outputs": {"grammar": 'root ::= ("x" [a-e]+ ";")+'},
        "min_tokens": 12,
        "bad_words": ["a"],
        "logit_bias": {"100": 5},
        "ignore_eos": True,
        "presence_penalty": 1.0,
    },
    "structured_outputs with a structural_tag": {
        "structured_outputs": {"structural_tag": {"structures": [{**TAG, "begin": "<f=a>"}], "triggers": ["<"]}},
        "logit_bias": {str(ord("<") + 1): 6},
        "temperature": 1.0,
        "seed": 18,
        "max_tokens": 96,
    },
    "prompt_logprobs": {"prompt_logprobs": 3, "n": 2, "temperature": 1.0, "seed": 19},
    "max_tokens": {"max_tokens": 1},
    "max_tokens 0": {"max_tokens": 0, "prompt_logprobs": 0},
}
ROWS: dict[str, tuple[str, Row]] = {
    **{f"chat {name}": (CHAT, row) for name, row in BOTH.items()},
    **{f"text {name}": (TEXT, row) for name, row in BOTH.items()},
    "chat logprobs": (CHAT, {"logprobs": True}),
    "chat top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 5}),
    "chat top_logprobs of n choices": (
        CHAT, {"logprobs": True, "top_logprobs": 2, "n": 2, "temperature": 1.0, "seed": 3},
    ),
    "chat top_logprobs and stop": (CHAT, {"logprobs": True, "top_logprobs": 2, "stop": ["y", "gn"]}),
    "chat logprobs of one token": (CHAT, {"logprobs": True, "top_logprobs": 20, "max_tokens": 1}),
    "chat max_completion_tokens": (CHAT, {"max_completion_tokens": 5}),
    "chat add_generation_prompt": (CHAT, {"add_generation_prompt": False}),
    "chat continue_final_message": (CHAT, {"add_generation_prompt": False, "continue_final_message": True}),
    "chat chat_template_kwargs": (CHAT, {"chat_template_kwargs": {"enable_thinking": False}}),
    "chat tools": (CHAT, {"tools": TOOLS}),
    "chat tool_choice": (CHAT, {"tools": TOOLS, "tool_choice": "required", "temperature": 1.0, "seed": 14}),
    "chat tool_choice of one tool": (CHAT, {"tools": TOOLS, "tool_choice": NAMED, "n": 2, "seed": 15}),
    "chat parallel_tool_calls": (
        CHAT, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 96},
    ),
    "chat tools that are strict": (
        CHAT, {"tools": STRICT, "temperature": 1.0, "seed": 20},
    ),
    "text logprobs": (TEXT, {"logprobs": 4}),
    "text logprobs and token ids": (TEXT, {"logprobs": 0, "return_token_ids": True}),
    "text echo": (TEXT, {"echo": True}),
    "text echo and logprobs": (TEXT, {"echo": True, "logprobs": 2, "return_token_ids": True}),
    "text echo and logprobs of a batch": (
        TEXT, {"echo": True, "logprobs": 1, "n": 2, "temperature": 1.0, "seed": 21, "prompt": [PROMPT, "b", PROMPT]},
    ),
    "text echo of prompts that are only scored": (
        TEXT, {"echo": True, "logprobs": 0, "max_tokens": 0, "prompt": [PROMPT, "b"], "truncate_prompt_tokens": 70},
    ),
    "text best_of": (TEXT, {"best_of": 4, "n": 2, "temperature": 1.0, "seed": 16}),
    "chat top_logprobs and response_format": (
        CHAT, {"logprobs": True, "top_logprobs": 2, "response_format": {"type": "json_object"}},
    ),
    "text prompt batch": (TEXT, {"prompt": [PROMPT, PROMPT + "b", "c"], "n": 2, "temperature": 1.0, "seed": 2}),
    "text prompt ids": (TEXT, {"prompt": [5, 6, 7] * 15}),
}  # fmt: skip
NOT_STREAMED = (  # it chooses among whole answers; as in vLLM
    "text best_of", *(f"{route} {name}" for route in ("chat", "text") for name in ("prompt_logprobs", "max_tokens 0")),
)  # fmt: skip
CELLS = [(name, stream) for name in ROWS for stream in (False, True) if not (stream and name in NOT_STREAMED)]
# Fields without a row, and why.
NO_ROW = {
    "model": "there is one", "priority": "says when, not what", "messages": "in every row", "prompt": "in every row",
    "stream": "a column", "stream_options": "in every streamed row", "user": "a label",
    "safety_identifier": "a label", "metadata": "a label",
}  # fmt: skip


def body_of(name: str, *, stream: bool) -> tuple[str, Row]:
    path, row = ROWS[name]
    asked: Row = {"model": "memory", "max_tokens": MAX_TOKENS, "temperature": 0}
    asked |= {"messages": [{"role": "user", "content": PROMPT}]} if path == CHAT else {"prompt": PROMPT}
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return path, asked | row


async def run(cluster: ApiCluster, name: str, *, stream: bool) -> Any:
    path, body = body_of(name, stream=stream)
    return await cluster.ask(path, body)


@functools.cache
def answers(way: Way) -> dict[tuple[str, bool], Any]:
    """Every row, streamed and not, from one cluster."""
    found: dict[tuple[str, bool], Any] = {}
    disaggregated = way in ("pair", "pair with a prefix hit")

    async def scenario(cluster: ApiCluster) -> None:
        for name, stream in CELLS:
            if way == "pair with a prefix hit":
                await run(cluster, name, stream=stream)  # leaves its prompt in both workers' caches
            else:
                for worker in cluster.workers:
                    worker.scheduler.memory.pool.drop_cache()
            found[name, stream] = await run(cluster, name, stream=stream)
        kinds = {
            kind: cluster.api.fleet.metrics.value("kvferry_placement_total", kind=kind) for kind in ("pair", "local")
        }
        assert kinds["local" if disaggregated else "pair"] == 0, kinds
        assert kinds["pair" if disaggregated else "local"] >= len(CELLS), kinds

    threshold = 100_000 if way == "local prefill" else 0
    api(scenario, disaggregated=way != "single worker", local_prefill_threshold=threshold)
    return found


def texts(answer: Any) -> dict[int, str]:
    if isinstance(answer, list):
        return {index: choice["text"] for index, choice in joined(answer).items()}
    return {c["index"]: (c["message"]["content"] or "") if "message" in c else c["text"] for c in answer["choices"]}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "stream"), CELLS, ids=[f"{name}-{'stream' if stream else 'whole'}" for name, stream in CELLS]
)
def test_every_way_equals_a_single_worker(name: str, stream: bool, way: Way) -> None:
    single, other = answers("single worker")[name, stream], answers(way)[name, stream]
    if stream and len(texts(single)) > 1:  # choices take turns as they come
        assert joined(other) == joined(single)
        assert timeless(other[-1]) == timeless(single[-1]), "usage"
    else:
        assert timeless(other) == timeless(single)


def test_the_columns_are_what_they_are_called() -> None:
    def cached(way: Way) -> dict[str, int]:
        usages = {name: answers(way)[name, False]["usage"] for name in ROWS}
        return {name: usage["prompt_tokens_details"]["cached_tokens"] for name, usage in usages.items()}

    scored = {name for name, (_, row) in ROWS.items() if "prompt_logprobs" in row or {"echo", "logprobs"} <= row.keys()}
    for way in ("single worker", "pair", "local prefill"):
        assert not any(cached(way).values()), way
    hits = cached("pair with a prefix hit")
    # What is scored P computes anew; D may have its KV all the same.
    assert {name for name, count in hits.items() if not count} <= scored


@pytest.mark.parametrize("name", [name for name, stream in CELLS if stream])
def test_a_stream_adds_up_to_the_whole_answer(name: str) -> None:
    whole, events = (answers("pair")[name, stream] for stream in (False, True))
    parts = joined(events)
    assert texts(events) == texts(whole)
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        assert part["reason"] == choice["finish_reason"]
        assert part["token_ids"] == (choice.get("token_ids") or [])
        told = {key: column or [] for key, column in (choice["logprobs"] or {}).items()}
        assert part["logprobs"] == told
        assert part["calls"] == [call["function"] for call in choice.get("message", {}).get("tool_calls", [])]
    usage = events[-1]["usage"]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[count] == whole["usage"][count]


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("chat greedy", "text greedy")])
def test_a_row_shows_its_feature(name: str) -> None:
    """A field that changed nothing would pass every comparison."""
    same = {"chat add_generation_prompt", "chat max_completion_tokens", "chat chat_template_kwargs",
            "chat add_special_tokens", "text add_special_tokens"}  # fmt: skip
    base = answers("single worker")["chat greedy" if name.startswith("chat") else "text greedy", False]
    if name not in same:
        fields = ("choices", "usage")
        assert {f: answers("single worker")[name, False][f] for f in fields} != {f: base[f] for f in fields}


RESUMED = ["text echo and logprobs", "chat tools that are strict",
           "text structured_outputs with a structural_tag", "chat top_logprobs", "text logprobs and token ids",
           "chat presence_penalty", "text min_tokens",
           "text logit_bias", "chat temperature", "chat n", "text skip_special_tokens",
           "chat response_format with a schema", "text structured_outputs",
           "text structured_outputs and all that bans and biases", "chat tool_choice"]  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_an_answer_is_the_same_after_its_decode_worker_was_killed(name: str) -> None:
    async def scenario(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(run(cluster, name, stream=True))
        await settled(lambda: any(len(stream.tokens) >= 4 for stream in cluster.streams), 10.0)
        stream = next(stream for stream in cluster.streams if len(stream.tokens) >= 4)
        assert stream.attempt is not None
        victim = next(w for w in cluster.workers if w.incarnation == stream.attempt.decode.incarnation)
        assert isinstance(victim, DecodeWorker)
        await cluster.kill(victim)
        found = await asking
        assert joined(found) == joined(answers("pair")[name, True])
        lost = cluster.api.fleet.metrics.value("kvferry_replacement_total", reason="decode_gone")
        assert lost >= 1, "the kill cost nobody anything"

    api(scenario, spares=1)


def test_the_comparison_finds_one_wrong_byte_in_what_is_handed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = MemoryRunner.gather

    def wrong(self: MemoryRunner, piece: Any, block_table: Any, out: memoryview) -> None:
        gather(self, piece, block_table, out)
        out[7] ^= 1

    async def scenario(cluster: ApiCluster) -> None:
        right = answers("pair")["text logprobs", False]
        monkeypatch.setattr(MemoryRunner, "gather", wrong)
        found = await run(cluster, "text logprobs", stream=False)
        monkeypatch.setattr(MemoryRunner, "gather", gather)
        told, wanted = (answer["choices"][0]["logprobs"] for answer in (found, right))
        assert told["tokens"][0] == wanted["tokens"][0], "P had right KV"
        assert told["token_logprobs"][0] == wanted["token_logprobs"][0]
        assert timeless(found) != timeless(right)

    answers("pair")
    api(scenario)


def test_best_of_tells_the_likeliest_per_token_and_counts_all() -> None:
    drawn = {"model": "memory", "prompt": ["a prompt", "b"], "max_tokens": 12, "temperature": 1.5, "seed": 17}

    async def scenario(cluster: ApiCluster) -> None:
        all_six = await cluster.ask(TEXT, drawn | {"n": 6, "logprobs": 0, "stop_token_ids": list(range(1, 30))})
        found = await cluster.ask(TEXT, drawn | {"n": 2, "best_of": 6, "stop_token_ids": list(range(1, 30))})
        likeliest: list[str] = []
        for first in (0, 6):
            scored = [
                (choice["logprobs"]["token_logprobs"], choice["text"]) for choice in all_six["choices"][first:][:6]
            ]
            assert len({len(logprobs) for logprobs, _ in scored}) > 1, "a sum would rank as a mean does"
            ranked = sorted(scored, key=lambda item: sum(item[0]) / len(item[0]), reverse=True)
            likeliest += [text for _, text in ranked[:2]]
        assert [choice["text"] for choice in found["choices"]] == likeliest
        assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
        assert not any(choice["logprobs"] for choice in found["choices"]), "nobody asked for them"
        for count in ("prompt_tokens", "completion_tokens"):
            assert found["usage"][count] == all_six["usage"][count]

    api(scenario)


def test_every_field_has_a_row() -> None:
    fields = set(ChatRequest.model_fields) | set(CompletionRequest.model_fields)
    shown = {field for _, row in ROWS.values() for field in row} | set(NO_ROW)
    assert fields - shown == set()
    assert shown - fields == set(), "a row of a field that is not built"
