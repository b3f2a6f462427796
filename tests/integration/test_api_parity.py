"""Each feature gives the same answer, bit for bit, from one worker, over the hand-off, and after a lost worker.

A row is a feature, a column a way through the cluster. The twin's KV, tokens and log-probabilities depend on every
byte of the context, so an equal answer means equal bytes all the way. Failover in every cell is `make parity`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import parity_page
import pytest
from api_cluster import ApiCluster, api, joined, timeless
from parity_rows import CELLS, CHAT, MODELS, RESPONSES, ROWS, TEXT, rows_of_fields
from parity_ways import WAYS, Way, after_a_kill, answers, equal, run, texts, told

from kvferry.engine.memory.runner import MemoryRunner

PAGE = Path(__file__).parents[2] / "docs" / "parity.md"


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize(
    ("name", "stream"), CELLS, ids=[f"{name}-{'stream' if stream else 'whole'}" for name, stream in CELLS]
)
def test_every_way_equals_a_single_worker(name: str, stream: bool, way: Way) -> None:
    single, other = answers("single worker")[name, stream], answers(way)[name, stream]
    assert equal(name, stream, other, single), (other, single)


def test_the_columns_are_what_they_are_called() -> None:
    def cached(way: Way) -> dict[str, int]:
        usages = {name: answers(way)[name, False]["usage"] for name in ROWS}
        details = ("prompt_tokens_details", "input_tokens_details")
        return {
            name: next(usage[key] for key in details if key in usage)["cached_tokens"] for name, usage in usages.items()
        }

    scored = {name for name, (_, row) in ROWS.items() if "prompt_logprobs" in row or {"echo", "logprobs"} <= row.keys()}
    for way in ("single worker", "pair", "local prefill"):
        assert not any(cached(way).values()), way
    hits = cached("pair with a prefix hit")
    # What is scored P computes anew; D may have its KV all the same.
    assert {name for name, count in hits.items() if not count} <= scored


@pytest.mark.parametrize("name", [name for name, stream in CELLS if stream])
def test_a_stream_adds_up_to_the_whole_answer(name: str) -> None:
    whole, events = (answers("pair")[name, stream] for stream in (False, True))
    if ROWS[name][0] == RESPONSES:
        assert told(events) == told(whole)
        return
    parts = joined(events)
    assert texts(events) == texts(whole)
    for choice in whole["choices"]:
        part = parts[choice["index"]]
        assert part["reason"] == choice["finish_reason"]
        assert part["token_ids"] == (choice.get("token_ids") or [])
        logprobs = {key: column or [] for key, column in (choice["logprobs"] or {}).items()}
        assert part["logprobs"] == logprobs
        assert part["calls"] == [call["function"] for call in choice.get("message", {}).get("tool_calls", [])]
    usage = events[-1]["usage"]
    for count in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage[count] == whole["usage"][count]


BASES = {CHAT: "chat greedy", TEXT: "text greedy", RESPONSES: "responses input"}


@pytest.mark.parametrize("name", [name for name in ROWS if name not in BASES.values()])
def test_a_row_shows_its_feature(name: str) -> None:
    """A field that changed nothing would pass every comparison."""
    same = {"chat add_generation_prompt", "chat max_completion_tokens", "chat chat_template_kwargs",
            "chat add_special_tokens", "text add_special_tokens"}  # fmt: skip
    path, _ = ROWS[name]
    base = answers("single worker")[BASES[path], False]
    if name not in same:
        fields = ("output" if path == RESPONSES else "choices", "usage")
        found = timeless(answers("single worker")[name, False])
        assert {f: found[f] for f in fields} != {f: timeless(base)[f] for f in fields}


RESUMED = ["text echo and logprobs", "chat tools that are strict",
           "text structured_outputs with a structural_tag", "chat top_logprobs", "text logprobs and token ids",
           "chat presence_penalty", "text min_tokens",
           "text logit_bias", "chat temperature", "chat n", "text skip_special_tokens",
           "chat response_format with a schema", "text structured_outputs",
           "text structured_outputs and all that bans and biases", "chat tool_choice",
           "responses top_logprobs"]  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_an_answer_is_the_same_after_its_decode_worker_was_killed(name: str) -> None:
    assert told(after_a_kill(name, stream=True)) == told(answers("pair")[name, True])


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


@pytest.mark.parametrize("path", MODELS)
def test_every_field_has_a_row(path: str) -> None:
    model, no_row = MODELS[path]
    rows = rows_of_fields(path)
    assert [field for field, names in rows.items() if not names and field not in no_row] == []
    shown = {field for of, row in ROWS.values() if of == path for field in row}
    assert shown - set(model.model_fields) == set(), "a row of a field that is not built"


def test_the_page_of_the_matrix_has_every_field_and_every_cell() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert parity_page.fields() in text, "make parity"
    found = parity_page.read(text)
    assert list(found) == list(ROWS), "make parity"
    for name, cells in found.items():
        assert len(cells) == 2 * len(parity_page.COLUMNS), name
        assert set(cells) <= {parity_page.EQUAL, *parity_page.REASONS}, f"{name}: an empty cell without a reason"
