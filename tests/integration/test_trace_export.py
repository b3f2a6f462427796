"""One tree of spans per request, over a real gateway and real workers on a virtual clock."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from api_cluster import BYTES, ApiCluster, api
from cluster import settled
from span_tree import Tree

from kvferry.trace.span import MemoryExporter, Span
from kvferry.trace.tracer import EXPORT_DELAY_S
from kvferry_decode.worker import DecodeWorker
from kvferry_gateway.flights.patience import NEW_REQUEST_WAIT

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
TICK_S = 0.001
SEVERAL = 2  # or more: how a prompt is cut depends on the speed of the steps before
CALLER = bytes(range(1, 17)).hex(), bytes(range(1, 9)).hex()
PAIR = Counter(
    {
        "prepare": 1,
        "attempt": 1,
        "attempt > prefill": 1,
        "attempt > prefill > queue": 1,
        "attempt > prefill > prefill chunk": SEVERAL,
        "attempt > prefill > KV send": 1,
        "attempt > prefill > KV hold": 1,
        "attempt > decode": 1,
        "attempt > decode > prefill wait": 1,
        "attempt > decode > queue": 1,
        "attempt > decode > KV fetch": 1,
        "attempt > decode > generation": 1,
    }
)


def text(**fields: Any) -> dict[str, Any]:
    return {"model": "memory", "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **fields}


def traced(scenario: Callable[[ApiCluster], Awaitable[None]], **options: Any) -> list[Span]:
    """The spans that a scenario leaves, once all are exported."""
    exporter = MemoryExporter()

    async def until_exported(cluster: ApiCluster) -> None:
        await scenario(cluster)
        await asyncio.sleep(3 * EXPORT_DELAY_S)

    api(until_exported, spans=exporter, **options)
    return exporter.spans


def asked(**fields: Any) -> Callable[[ApiCluster], Awaitable[None]]:
    async def scenario(cluster: ApiCluster) -> None:
        await cluster.ask(TEXT, text(**fields))

    return scenario


def shape_of(tree: Tree) -> Counter[str]:
    shape = tree.shape
    del shape[tree.root.name]
    return Counter({path: min(count, SEVERAL) if "chunk" in path else count for path, count in shape.items()})


def facts(span: Span) -> dict[str, Any]:
    return {name.removeprefix("kvferry."): value for name, value in span.attributes.items()}


def check_chunks(tree: Tree, prefill: Span, num_tokens: int) -> None:
    """The chunks of a prefill tile its tokens in order, one after the other in time."""
    chunks = [span for span in tree.children(prefill) if span.name == "prefill chunk"]
    next_token = facts(prefill)["cached_tokens"]
    moment = 0.0
    for chunk in chunks:
        assert facts(chunk)["first_token"] == next_token
        assert chunk.began >= moment
        assert chunk.ended > chunk.began
        next_token += facts(chunk)["num_tokens"]
        moment = chunk.ended
    assert next_token == num_tokens
    assert facts(prefill)["num_chunks"] == len(chunks)


def test_a_request_is_one_tree_over_gateway_prefill_and_decode() -> None:
    tree = Tree(traced(asked()))
    assert shape_of(tree) == PAIR
    tree.check_times(TICK_S)
    root, attempt, prefill, decode = (tree.one(name) for name in (tree.root.name, "attempt", "prefill", "decode"))
    assert root.name == f"POST {TEXT}"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["gen_ai.usage.input_tokens"] == len(PROMPT)
    assert root.attributes["gen_ai.usage.output_tokens"] == 6
    assert not any(span.error for span in tree.spans)
    assert {span.name: span.kind for span in (root, attempt, prefill, decode)} == {
        root.name: "server", "attempt": "client", "prefill": "server", "decode": "server"
    }  # fmt: skip
    assert {facts(span)["request_id"] for span in (root, prefill, decode)} == {facts(root)["request_id"]}
    check_chunks(tree, prefill, len(PROMPT))
    assert facts(attempt)["placement.why"] == "least_work"
    assert (facts(attempt)["prefill"], facts(attempt)["decode"]) == ("prefill-0", "decode-0")
    assert (facts(attempt)["outcome"], facts(prefill)["outcome"], facts(decode)["outcome"]) == (
        "length", "handed over", "length"
    )  # fmt: skip
    assert (facts(attempt)["tokens"], facts(decode)["tokens"]) == (6, 6)


def test_the_stages_follow_on_each_other() -> None:
    tree = Tree(traced(asked()))
    prefill, attempt = tree.one("prefill"), tree.one("attempt")
    fetch, send, hold = tree.one("KV fetch"), tree.one("KV send"), tree.one("KV hold")
    last_chunk = tree.named("prefill chunk")[-1]
    (first_token,) = prefill.events
    assert first_token.name == "first token"
    assert first_token.at == last_chunk.ended == hold.began
    assert [event.name for event in attempt.events] == ["accepted", "first token"]
    assert attempt.events[1].at >= first_token.at
    assert fetch.began <= send.began
    assert hold.ended == send.ended >= fetch.ended
    assert tree.one("generation").began == fetch.ended
    assert facts(fetch)["bytes"] > 0
    assert facts(fetch)["num_bad_frames"] == 0


def test_a_local_prefill_has_its_chunks_on_the_decode_worker() -> None:
    tree = Tree(traced(asked(), disaggregated=False))
    assert shape_of(tree) == Counter(
        {
            "prepare": 1, "attempt": 1, "attempt > decode": 1, "attempt > decode > queue": 1,
            "attempt > decode > prefill chunk": SEVERAL, "attempt > decode > generation": 1,
        }
    )  # fmt: skip
    tree.check_times(TICK_S)
    check_chunks(tree, tree.one("decode"), len(PROMPT))
    assert facts(tree.one("attempt"))["placement.why"] == "no_prefill_worker"


def test_a_cached_prefix_is_no_chunk() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        for _ in range(2):
            await cluster.ask(TEXT, text())

    spans = traced(scenario)
    by_trace: dict[bytes, list[Span]] = {}
    for span in spans:
        by_trace.setdefault(span.context.trace_id, []).append(span)
    first, second = map(Tree, by_trace.values())
    assert facts(first.one("prefill"))["cached_tokens"] == 0
    cached = facts(second.one("prefill"))["cached_tokens"]
    assert 0 < cached < len(PROMPT)
    check_chunks(second, second.one("prefill"), len(PROMPT))
    assert facts(second.one("KV fetch"))["first_token"] == cached


async def _kill_decode(cluster: ApiCluster) -> None:
    """In mid-stream."""
    await settled(lambda: any(len(stream.tokens) >= 3 for stream in cluster.streams), 10.0)
    (stream,) = cluster.streams
    assert stream.attempt is not None
    victim = next(w for w in cluster.workers if w.incarnation == stream.attempt.decode.incarnation)
    assert isinstance(victim, DecodeWorker)
    await cluster.kill(victim)


def test_after_a_failure_each_attempt_is_a_span_with_its_own_reason() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=40)))
        await _kill_decode(cluster)
        await asking

    tree = Tree(traced(scenario, spares=1), num_dead=1)
    tree.check_times(TICK_S)
    lost, second = tree.named("attempt")
    assert (lost.error, facts(lost)["outcome"]) == ("decode_gone", "decode_gone")
    assert (second.error, facts(second)["outcome"]) == (None, "length")
    assert facts(lost)["decode"] != facts(second)["decode"]
    assert facts(second)["first_index"] == facts(lost)["tokens"] > 0
    assert facts(lost)["tokens"] + facts(second)["tokens"] == 40
    assert second.began >= lost.ended
    assert "placement.why" in facts(lost)
    assert "placement.why" in facts(second)
    # The dead tells of the stages that it had been through; the prefill worker saw both attempts.
    assert [span.name for span in tree.orphans] == ["prefill wait", "queue", "KV fetch"]
    assert [child.name for child in tree.children(lost)] == ["prefill"]
    assert {child.name for child in tree.children(second)} == {"prefill", "decode"}
    assert tree.root.error is None


def test_the_wait_for_a_worker_is_a_span() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(cluster.ask(TEXT, text(max_tokens=40)))
        await _kill_decode(cluster)
        await settled(lambda: bool(cluster.api.fleet.waiting), 5.0)
        await asyncio.sleep(2.0)
        await cluster.decode("decode-9", model=BYTES)
        await asking

    tree = Tree(traced(scenario), num_dead=1)
    wait = tree.one("wait for workers")
    lost, second = tree.named("attempt")
    assert wait.ended - wait.began > 2.0
    assert lost.ended <= wait.began
    assert abs(second.began - wait.ended) < 0.1
    assert facts(second)["decode"] == "decode-9"


def test_every_choice_has_its_attempts() -> None:
    tree = Tree(traced(asked(n=3, temperature=1.0, seed=1)))
    tree.check_times(TICK_S)
    attempts = sorted(tree.named("attempt"), key=lambda span: facts(span)["choice"])
    assert [facts(span)["choice"] for span in attempts] == [0, 1, 2]
    assert facts(tree.root)["choices"] == 3
    assert tree.root.attributes["gen_ai.usage.output_tokens"] == 18
    leader_has_token = attempts[0].events[-1].at
    assert all(span.began >= leader_has_token for span in attempts[1:])


def test_a_client_that_leaves_ends_its_spans() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        await cluster.leave(
            TEXT, text(stream=True, max_tokens=500), lambda: any(len(stream.tokens) > 2 for stream in cluster.streams)
        )

    tree = Tree(traced(scenario))
    assert shape_of(tree) == PAIR
    assert (facts(tree.root)["outcome"], tree.root.error) == ("client_gone", None)
    assert facts(tree.one("attempt"))["outcome"] == "cancelled"
    assert facts(tree.one("decode"))["outcome"] == "cancelled"
    assert not any(span.error for span in tree.spans)


def test_a_placement_that_was_refused_is_a_span_that_says_why() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        (prefill,) = (worker for worker in cluster.workers if worker.role == "prefill")
        prefill.state = "draining"  # before its heartbeat tells
        await cluster.ask(TEXT, text())

    tree = Tree(traced(scenario))
    tree.check_times(TICK_S)
    refused, second = tree.named("attempt")
    assert (facts(refused)["outcome"], refused.error) == ("refused: draining", None)
    assert (facts(second)["outcome"], facts(second)["placement.why"]) == ("length", "no_prefill_worker")
    assert not tree.named("prefill")
    assert [facts(child)["outcome"] for child in tree.children(refused)] == ["cancelled"]


def test_a_request_that_nobody_takes_fails() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        for worker in cluster.workers:
            worker.state = "draining"
        assert (await cluster.error(TEXT, text(), 503))["code"] == "no_worker"

    tree = Tree(traced(scenario))
    assert {facts(attempt)["outcome"] for attempt in tree.named("attempt")} == {"refused: draining"}
    wait = tree.one("wait for workers")
    assert wait.ended - wait.began > NEW_REQUEST_WAIT
    assert (tree.root.error, tree.root.attributes["http.response.status_code"]) == ("no_worker", 503)
    assert tree.root.attributes["error.type"] == "no_worker"


def test_a_request_that_is_wrong_or_too_much_is_a_span_without_an_attempt() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        await cluster.error(TEXT, text(max_tokens=-1))
        await cluster.error(TEXT, text(n=5, temperature=1.0), 429)

    wrong, refused = traced(scenario, max_requests=4)
    assert wrong.attributes["http.response.status_code"] == 400
    assert refused.attributes["http.response.status_code"] == 429
    assert facts(refused)["outcome"] == "rate_limit_exceeded"
    assert (wrong.error, refused.error) == (None, None)  # the client's own


def test_the_clients_trace_goes_on_here_if_it_is_recorded() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        for flag in ("00", "01"):
            headers = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-{flag}", "tracestate": "congo=t61"}
            response = await cluster.http.post(TEXT, json=text(), headers=headers, timeout=None)
            assert response.status_code == 200
            assert "traceparent" not in response.headers

    tree = Tree(traced(scenario, trace_sample_ratio=0.0), above=bytes.fromhex(CALLER[1]))
    assert {span.context.trace_id.hex() for span in tree.spans} == {CALLER[0]}
    assert {span.context.state for span in tree.spans} == {"congo=t61"}
    assert len(tree.named("attempt")) == 1


def test_no_word_of_a_prompt_an_output_or_a_label_is_in_a_span() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        messages = [{"role": "user", "content": "the sealed envelope " * 10}]
        labels = {"user": "alice", "safety_identifier": "bob", "metadata": {"project": "board"}}
        asked = {"structured_outputs": {"choice": ["zanzibar"]}, "stop": ["mombasa"], **labels}
        answer = await cluster.ask(CHAT, {"model": "memory", "messages": messages, "max_tokens": 40, **asked})
        assert answer["choices"][0]["message"]["content"] == "zanzibar"

    told = repr(traced(scenario))
    assert "gen_ai.request.model" in told
    for secret in ("sealed", "zanzibar", "mombasa", "alice", "bob", "board"):
        assert secret not in told


def test_untraced_requests_cost_the_workers_nothing() -> None:
    async def scenario(cluster: ApiCluster) -> None:
        asking = asyncio.ensure_future(cluster.ask(TEXT, text()))
        await settled(lambda: bool(cluster.streams), 5.0)
        sequences = [sequence for worker in cluster.workers for sequence in worker.scheduler.sequences.values()]
        assert sequences
        assert all(sequence.journal is None and sequence.work.trace is None for sequence in sequences)
        await asking

    assert traced(scenario, trace_sample_ratio=0.0) == []
