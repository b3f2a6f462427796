"""How likely a prompt is: told whole and right, whatever the bus loses and whoever dies, and computed once.

The twin's log-probabilities depend on every byte of KV before a token, so they also show that nothing came from a
prefix cache but through right KV.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from api_cluster import BYTES, ApiCluster, api, joined
from cluster import settled
from scripted_worker import tokens_of

from kvferry.engine.memory.runner import MemoryRunner, scored_prompt
from kvferry.schedule.step import StepPlan, StepResult
from kvferry.wire.sampling import Scoring
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import DecodeRequest, PrefillRequest, Work
from kvferry_gateway.fleet.fleet import Fleet
from kvferry_gateway.streams.dispatcher import Dispatcher
from kvferry_prefill.worker import PrefillWorker

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
LONG = "The ferry crosses at noon; who is late waits for the next one, which may be tomorrow. " * 7
SHORT = "What is on the other side? "
Told = list[dict[str, Any] | None]


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "memory", "prompt": LONG, "max_tokens": 6, "temperature": 0, "prompt_logprobs": 2, **fields}


@functools.cache
def likely(prompt: str, num_top: int = 2) -> Told:
    """vLLM's form of what the twin's model says of a prompt, from its text alone."""
    tokens = tokens_of(prompt)
    told: Told = [None]
    for token, row in zip(tokens[1:], scored_prompt(BYTES, tokens, num_top), strict=True):
        entries = {token: (row.logprob, row.rank)}
        best = zip(row.top_tokens, row.top_logprobs, strict=True)
        entries |= {other: (logprob, rank) for rank, (other, logprob) in enumerate(best, 1)}
        told.append(
            {str(other): {"logprob": pytest.approx(p, abs=1e-6), "rank": rank} for other, (p, rank) in entries.items()}
        )
    return told


def bare(told: Told) -> Told:
    """Without the tokens' texts."""
    return [
        entry and {token: {"logprob": row["logprob"], "rank": row["rank"]} for token, row in entry.items()}
        for entry in told
    ]


class Losses:
    """Batches on their way to the gateway that get lost: those for which `lost` says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: Callable[[TokenBatch], bool]) -> None:
        self.count = 0
        take = Dispatcher.take

        def lossy(dispatcher: Dispatcher, batch: TokenBatch) -> None:
            if lost(batch):
                self.count += 1
            else:
                take(dispatcher, batch)

        monkeypatch.setattr(Dispatcher, "take", lossy)


def first(count: int) -> Callable[[TokenBatch], bool]:
    """The first `count` batches with log-probabilities of a prompt."""
    left = [count]

    def lost(batch: TokenBatch) -> bool:
        left[0] -= bool(batch.prompts)
        return bool(batch.prompts) and left[0] >= 0

    return lost


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of any worker has scored."""
    counts: list[int] = []
    execute = MemoryRunner.execute

    def counted(runner: MemoryRunner, plan: StepPlan) -> StepResult:
        counts.extend(len(step.score.targets) for step in plan.steps if step.score is not None)
        return execute(runner, plan)

    monkeypatch.setattr(MemoryRunner, "execute", counted)
    return counts


@pytest.fixture
def works(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """What workers were asked for, each attempt once."""
    works: list[Work] = []
    ask = Fleet.ask

    async def noted(fleet: Fleet, worker: Any, request: PrefillRequest | DecodeRequest) -> Any:
        if all(work.key != request.work.key for work in works):
            works.append(request.work)
        return await ask(fleet, worker, request)

    monkeypatch.setattr(Fleet, "ask", noted)
    return works


def scenario(
    test: Callable[[ApiCluster], Awaitable[None]], *, ways: tuple[bool, ...] = (True, False), **options: Any
) -> None:
    for disaggregated in ways:
        api(test, disaggregated=disaggregated, **options)


def worker(cluster: ApiCluster, kind: type[Any]) -> Any:
    return next(found for found in cluster.workers if isinstance(found, kind))


def test_every_token_of_the_prompt_is_told_in_both_routes_and_none_comes_from_a_cache(scored: list[int]) -> None:
    async def test(cluster: ApiCluster) -> None:
        scored.clear()
        for _ in range(2):
            answer = await cluster.ask(TEXT, text(n=2, temperature=1.0, seed=3))
            assert [bare(choice["prompt_logprobs"]) for choice in answer["choices"]] == [likely(LONG)] * 2
        assert sum(scored) == 2 * (len(LONG) - 1), "once for both choices, and once more for the second request"
        chat = {"model": "memory", "messages": [{"role": "user", "content": SHORT}], "max_tokens": 3}
        answer = await cluster.ask(CHAT, chat | {"prompt_logprobs": 0, "temperature": 0})
        assert bare(answer["prompt_logprobs"]) == likely(f"user:{SHORT}\nassistant:", 0)
        plain = await cluster.ask(CHAT, chat | {"temperature": 0})
        assert plain["choices"] == answer["choices"]
        assert "prompt_logprobs" not in plain

    scenario(test)


def test_an_echo_with_logprobs_is_one_row_of_columns_streamed_and_not() -> None:
    async def test(cluster: ApiCluster) -> None:
        asked = {"model": "memory", "prompt": SHORT, "max_tokens": 5, "temperature": 0, "logprobs": 2}
        plain = (await cluster.ask(TEXT, asked))["choices"][0]
        whole = (await cluster.ask(TEXT, asked | {"echo": True}))["choices"][0]
        streamed = joined(await cluster.ask(TEXT, asked | {"echo": True, "stream": True}))[0]
        assert whole["text"] == streamed["text"] == SHORT + plain["text"]
        assert streamed["logprobs"] == whole["logprobs"]
        columns, rows = whole["logprobs"], scored_prompt(BYTES, tokens_of(SHORT), 2)
        size = len(SHORT)
        assert columns["tokens"] == [*SHORT, *plain["logprobs"]["tokens"]]
        assert columns["text_offset"][:size] == list(range(size))
        assert columns["text_offset"][size:] == [size + offset for offset in plain["logprobs"]["text_offset"]]
        assert columns["token_logprobs"][0] is columns["top_logprobs"][0] is None
        assert columns["token_logprobs"][1:size] == [pytest.approx(row.logprob, abs=1e-6) for row in rows]
        assert columns["token_logprobs"][size:] == plain["logprobs"]["token_logprobs"]
        assert columns["top_logprobs"][size:] == plain["logprobs"]["top_logprobs"]
        for row, char, tops in zip(rows, SHORT[1:], columns["top_logprobs"][1:size], strict=True):
            assert tops[char] == pytest.approx(row.logprob, abs=1e-6)
            assert list(tops.values())[: len(row.top_logprobs)] == pytest.approx(list(row.top_logprobs), abs=1e-6)

    scenario(test)


def test_prompts_are_scored_without_a_token_drawn(works: list[Work]) -> None:
    """As evaluation harnesses ask: lists of token ids, `max_tokens` 0 or 1."""

    async def test(cluster: ApiCluster) -> None:
        prompts = [tokens_of(LONG), tokens_of(SHORT), tokens_of("a")]
        asked = {"model": "memory", "prompt": prompts, "temperature": 0, "logprobs": 1, "echo": True}
        works.clear()
        none = await cluster.ask(TEXT, asked | {"max_tokens": 0})
        assert len(works) == 2, "of one token nothing is to be computed"
        assert none["usage"]["completion_tokens"] == 0
        moved = [found.metrics.value("kvferry_kv_bytes_total", direction="sent") for found in cluster.workers]
        assert not any(moved), "nobody goes on with their KV"
        one = await cluster.ask(TEXT, asked | {"max_tokens": 1})
        for prompt, choice, other in zip((LONG, SHORT, "a"), none["choices"], one["choices"], strict=True):
            assert (choice["text"], choice["finish_reason"]) == (prompt, "length")
            assert len(choice["logprobs"]["tokens"]) == len(prompt)
            for column, told in choice["logprobs"].items():
                assert other["logprobs"][column][:-1] == told
        streamed = joined(await cluster.ask(TEXT, asked | {"max_tokens": 0, "stream": True}))
        assert {i: part["logprobs"] for i, part in streamed.items()} == {
            choice["index"]: choice["logprobs"] for choice in none["choices"]
        }

    scenario(test)


def test_an_echo_of_no_token_needs_no_worker_at_all(works: list[Work]) -> None:
    async def test(cluster: ApiCluster) -> None:
        asked = {"model": "memory", "prompt": [LONG, SHORT], "max_tokens": 0, "echo": True, "n": 2}
        for stream in (False, True):
            answer = await cluster.ask(TEXT, asked | {"stream": stream})
            told = joined(answer).values() if stream else answer["choices"]
            assert [part["text"] for part in told] == [LONG, LONG, SHORT, SHORT]
        assert not works

    scenario(test)


def test_a_truncated_prompt_is_scored_as_it_is_then() -> None:
    async def test(cluster: ApiCluster) -> None:
        answer = await cluster.ask(TEXT, text(truncate_prompt_tokens=20))
        assert bare(answer["choices"][0]["prompt_logprobs"]) == likely(LONG[-20:])

    scenario(test)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("max_tokens", [0, 1, 6])
def test_lost_log_probabilities_are_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, works: list[Work], scored: list[int], max_tokens: int, count: int
) -> None:
    async def test(cluster: ApiCluster) -> None:
        works.clear(), scored.clear()
        losses = Losses(monkeypatch, first(count))
        answer = await cluster.ask(TEXT, text(max_tokens=max_tokens))
        assert losses.count == count
        assert bare(answer["choices"][0]["prompt_logprobs"]) == likely(LONG)
        assert answer["usage"]["completion_tokens"] == max_tokens
        assert len(works) == 1, "no attempt was lost for it"
        assert sum(scored) == len(LONG) - 1
        monkeypatch.undo()

    scenario(test, ways=(True,))


def test_who_scored_a_prompt_keeps_it_until_it_has_arrived_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    losing = [True]
    Losses(monkeypatch, lambda batch: losing[0] and bool(batch.prompts))

    async def test(cluster: ApiCluster) -> None:
        prefill = worker(cluster, PrefillWorker)
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=400, ignore_eos=True)))
        await settled(lambda: any(len(stream.tokens) > 40 for stream in cluster.streams), 10.0)
        assert not prefill.scheduler.sequences, "D has the KV, and P gave its blocks back"
        assert len(prefill.outbox) == 1
        losing[0] = False
        await settled(lambda: len(prefill.outbox) == 0, 2.0)
        assert not asking.done()
        assert bare((await asking)["choices"][0]["prompt_logprobs"]) == likely(LONG)

    scenario(test, ways=(True,))


def test_a_killed_decode_worker_costs_no_second_scoring(works: list[Work], scored: list[int]) -> None:
    async def test(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=30)))
        await settled(lambda: any(len(stream.tokens) > 4 for stream in cluster.streams), 10.0)
        (attempt,) = (stream.attempt for stream in cluster.streams)
        assert attempt is not None
        await cluster.kill(next(w for w in cluster.workers if w.incarnation == attempt.decode.incarnation))
        answer = await asking
        assert bare(answer["choices"][0]["prompt_logprobs"]) == likely(LONG)
        assert len(works) > 1
        assert [work.scoring for work in works] == [Scoring(2), *[None] * (len(works) - 1)]
        assert sum(scored) == len(LONG) - 1

    scenario(test, ways=(True,), spares=1)


def test_scoring_goes_on_where_a_killed_prefill_worker_left_it(works: list[Work], scored: list[int]) -> None:
    async def test(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=5)))
        await settled(lambda: any(s.scores is not None and s.scores.next > 100 for s in cluster.streams), 10.0)
        await cluster.kill(worker(cluster, PrefillWorker))
        answer = await asking
        assert bare(answer["choices"][0]["prompt_logprobs"]) == likely(LONG)
        (before, after) = (work.scoring for work in works)
        assert before == Scoring(2)
        assert after is not None
        assert after.start > 100
        assert sum(scored) < 2 * (len(LONG) - 1)

    scenario(test, ways=(True,))


@pytest.mark.parametrize("max_tokens", [3, 400])
def test_a_prompt_whose_scores_died_with_their_worker_is_scored_by_another(
    monkeypatch: pytest.MonkeyPatch, works: list[Work], max_tokens: int
) -> None:
    """With 3 tokens all else is complete by then: nothing is generated anew."""
    prefills: set[int] = set()
    Losses(monkeypatch, lambda batch: bool(batch.prompts) and batch.incarnation in prefills)

    async def test(cluster: ApiCluster) -> None:
        prefill = worker(cluster, PrefillWorker)
        prefills.add(prefill.incarnation)
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=max_tokens, ignore_eos=True)))
        await settled(lambda: any(len(stream.tokens) >= 3 for stream in cluster.streams), 10.0)
        await asyncio.sleep(0.1)
        assert not asking.done()
        await cluster.kill(prefill)
        answer = await asking
        assert bare(answer["choices"][0]["prompt_logprobs"]) == likely(LONG)
        assert answer["usage"]["completion_tokens"] == max_tokens
        again = works[-1]
        assert again.scoring == Scoring(2)
        assert (again.sampling.max_tokens == 0) == (max_tokens == 3)
        assert bool(again.generated) == (max_tokens == 400)

    scenario(test, ways=(True,))


def test_a_worker_of_an_older_version_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvferry.worker.report.FEATURES", ())

    async def test(cluster: ApiCluster) -> None:
        assert (await cluster.error(TEXT, text(), 503))["code"] == "no_worker"
        assert (await cluster.ask(TEXT, text(prompt_logprobs=None)))["usage"]["completion_tokens"] == 6

    scenario(test)


def test_what_can_not_be_is_refused_by_name() -> None:
    async def test(cluster: ApiCluster) -> None:
        for fields, param in (
            ({"stream": True}, "prompt_logprobs"),
            ({"prompt_logprobs": 21}, "prompt_logprobs"),
            ({"prompt_logprobs": -1}, "prompt_logprobs"),
            ({"prompt_logprobs": None, "max_tokens": 0}, "max_tokens"),
            ({"prompt": ["a"] * 129}, "prompt"),
            ({"prompt_logprobs": 20, "prompt": [LONG] * 100}, "prompt_logprobs"),
            ({"logprobs": 20, "echo": True, "prompt_logprobs": None, "prompt": LONG, "n": 100}, "logprobs"),
            ({"prompt": [[1]] * 129}, "prompt"),
        ):
            error = await cluster.error(TEXT, text(**fields))
            assert error["param"] == param
        assert "129 prompts" in error["message"]
        assert "128" in error["message"]

    scenario(test, ways=(False,))
