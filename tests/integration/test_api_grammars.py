"""Structured output through a real gateway over real workers: P masks token 0, D the rest, and what fails says so."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest
from api_cluster import BYTES, ApiCluster, api, joined, scenario
from masks import FixedMask
from scripted_worker import EOS, text_of
from structlog.testing import capture_logs

from kvferry.grammar.compiler import GrammarCompiler
from kvferry.grammar.mask import GrammarMask
from kvferry.runtime import now
from kvferry.wire.sampling import MAX_GRAMMAR_CHARS
from kvferry_gateway.flights.patience import NEW_REQUEST_WAIT
from kvferry_gateway.requests.structured import GrammarCheck

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "The quick brown fox jumps over the lazy dog, twice."
REGEX = "(ab|cd?){4,9}!"


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "memory", "prompt": PROMPT, "max_tokens": 64, "temperature": 1.5, "seed": 1, **fields}


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": PROMPT}], "model": "memory", "max_tokens": 400, **fields}


@pytest.mark.parametrize("disaggregated", [True, False], ids=["pair", "single worker"])
def test_texts_follow_their_grammars_to_the_end(disaggregated: bool) -> None:
    async def test(cluster: ApiCluster) -> None:
        for seed in range(6):
            for outputs, right in (
                ({"regex": REGEX}, lambda found: re.fullmatch(REGEX, found)),
                ({"choice": ["left", "right", "straight on"]}, lambda found: found in ("left", "right", "straight on")),
                ({"grammar": 'root ::= "(" root ")" | "x"'}, lambda found: re.fullmatch(r"\(*x\)*", found)),
                (
                    {"json": {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
                              "additionalProperties": False}},
                    lambda found: json.loads(found)["a"] in (1, 2),
                ),
            ):  # fmt: skip
                answer = await cluster.ask(TEXT, text(structured_outputs=outputs, seed=seed, max_tokens=200))
                (choice,) = answer["choices"]
                assert choice["finish_reason"] == "stop", choice
                assert right(choice["text"]), choice

    api(test, disaggregated=disaggregated)


@scenario
async def test_each_choice_has_a_state_of_its_own(cluster: ApiCluster) -> None:
    answer = await cluster.ask(TEXT, text(structured_outputs={"regex": REGEX}, n=8, stream=True))
    texts = [choice["text"] for choice in joined(answer).values()]
    assert len(set(texts)) > 4
    assert all(re.fullmatch(REGEX, found) for found in texts)


@scenario
async def test_min_tokens_and_ignore_eos_keep_the_end_away_only_while_the_grammar_goes_on(cluster: ApiCluster) -> None:
    for field, finish in (({"min_tokens": 20}, "stop"), ({"ignore_eos": True}, "length")):
        answer = await cluster.ask(TEXT, text(structured_outputs={"regex": "[ab]*"}, **field))
        assert len(answer["choices"][0]["text"]) >= 20
        assert answer["choices"][0]["finish_reason"] == finish
    for field in ({"min_tokens": 20}, {"ignore_eos": True}, {"stop_token_ids": [EOS], "min_tokens": 20}):
        answer = await cluster.ask(TEXT, text(structured_outputs={"regex": "[ab]{5}"}, return_token_ids=True, **field))
        (choice,) = answer["choices"]
        assert (len(choice["text"]), choice["finish_reason"], choice["token_ids"][-1]) == (5, "stop", EOS)
        assert answer["usage"]["completion_tokens"] == 6


@scenario
async def test_logprobs_are_of_the_model_not_of_the_mask(cluster: ApiCluster) -> None:
    asked = text(temperature=0, logprobs=1, max_tokens=1)
    free = await cluster.ask(TEXT, asked)
    masked = await cluster.ask(TEXT, {**asked, "structured_outputs": {"regex": "zz"}})
    assert masked["choices"][0]["text"] == "z"
    best = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in (free, masked)]
    assert {"z": masked["choices"][0]["logprobs"]["token_logprobs"][0]}.items() <= best[1].items()
    assert best[0].items() <= best[1].items(), "the model's own best is told beside the drawn one"


@scenario
async def test_a_bad_grammar_is_a_400_that_names_the_field_and_reaches_no_worker(cluster: ApiCluster) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "objekt"}}}
    for fields, param in (
        ({"response_format": wrong}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"regex": r"[^\x00-\U0010ffff]"}}, "structured_outputs.regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs.grammar"),
        ({"structured_outputs": {"json": {"not": {"type": "string"}}}}, "structured_outputs.json"),
        ({"structured_outputs": {"grammar": "a" * (MAX_GRAMMAR_CHARS + 1)}}, "structured_outputs.grammar"),
    ):
        for path, body in ((TEXT, text(**fields)), (CHAT, chat(**fields, stream=True))):
            error = await cluster.error(path, body)
            assert (error["param"], error["code"]) == (param, "invalid_value")
    assert all(worker.engine_loop.num_steps == 0 for worker in cluster.workers)


@scenario
async def test_a_grammar_that_fails_on_a_worker_ends_the_request_with_an_error(cluster: ApiCluster) -> None:
    tight = GrammarCompiler(cluster.tokenizer_path, BYTES.vocab_size, BYTES.eos_token_ids)  # type: ignore[arg-type]
    tight._limits = type(tight._limits)(max_grammar_size=1)
    for worker in cluster.workers:
        usual, worker.grammars._compiler = worker.grammars._compiler, tight
        with capture_logs() as logs:
            error = await cluster.error(TEXT, text(structured_outputs={"regex": "secret+"}))
        assert error["code"] == "grammar_failed"
        assert "secret" not in repr(logs), "a grammar is a part of the request"
        worker.grammars._compiler = usual
    assert cluster.api.fleet.metrics.value("kvferry_replacement_total", reason="grammar") == len(cluster.workers)


@pytest.mark.parametrize("place", [0, 1, 5])
def test_a_grammar_that_fails_half_way_costs_its_own_sequence_and_no_other(
    place: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    advance = GrammarMask.advance

    def failing(mask: GrammarMask, generated: Any) -> None:
        advance(mask, generated)
        if len(generated) == place and text_of(generated.tolist()).startswith("ab"[:place]):
            mask.fault = "planted"

    async def test(cluster: ApiCluster) -> None:
        monkeypatch.setattr(GrammarCheck, "check", lambda self, constraint: asyncio.sleep(0))
        others = [asyncio.ensure_future(cluster.ask(TEXT, text(seed=seed, ignore_eos=True))) for seed in range(4)]
        monkeypatch.setattr(GrammarMask, "advance", failing)
        body = text(structured_outputs={"regex": "(ab){20}"})
        response = await cluster.http.post(TEXT, json={**body, "stream": True}, timeout=None)
        assert "planted" in response.text, response.text
        assert '"code":"grammar_failed"' in response.text
        assert '"finish_reason":"stop"' not in response.text
        for other in others:
            assert (await other)["usage"]["completion_tokens"] == 64

    api(test)


def test_a_worker_that_passes_over_grammars_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As workers of an older version do: they ignore the field, and the text would be anything."""
    monkeypatch.setattr(ApiCluster, "_grammars", lambda self, model: None)

    async def test(cluster: ApiCluster) -> None:
        began = now()
        error = await cluster.error(TEXT, text(structured_outputs={"regex": REGEX}), 503)
        assert error["code"] == "no_worker"
        assert now() - began < NEW_REQUEST_WAIT, "nobody is away"
        assert (await cluster.ask(TEXT, text()))["choices"][0]["text"], "anything else is served"

    api(test)


@scenario
async def test_a_first_token_outside_of_the_grammar_is_found_by_the_decode_worker(cluster: ApiCluster) -> None:
    prefill = cluster.workers[0]
    accepted = prefill.grammars.accepted

    def unmasked(sequence: Any) -> None:
        sequence.mask = FixedMask(np.full(-(-BYTES.vocab_size // 32), 0xFFFFFFFF, np.uint32))  # allows all

    prefill.grammars.accepted = unmasked  # type: ignore[method-assign]
    error = await cluster.error(TEXT, text(structured_outputs={"regex": "abc"}, seed=3))
    assert error["code"] == "grammar_failed"
    prefill.grammars.accepted = accepted  # type: ignore[method-assign]
