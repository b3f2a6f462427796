"""Traces of a real stack, as a real receiver of OTLP over HTTP gets them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from otlp_receiver import OtlpReceiver
from pages import parts, put, written
from span_tree import Tree
from stack import Stack, eventually

from kvferry.trace.span import Span

CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{CALLER[0]}-{CALLER[1]}-01", "tracestate": "congo=t61"}
MAX_TOKENS = 64
CLOCKS_S = 0.05  # by which processes of one machine may disagree: the loops' clocks are read once a turn
PROCESSES = {"gateway-0", "prefill-0", "decode-0", "decode-1"}


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    try:
        yield receiver
    finally:
        receiver.close()


@pytest.fixture(scope="module")
def traced(receiver: OtlpReceiver, flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Named by the variable that OpenTelemetry's own programs know, as the page does."""
    (command,) = written("docs/tracing.md", "traced")
    environ, words = parts(put(command, {"http://127.0.0.1:4318": receiver.url}))
    assert words == ["kvferry", "up"]
    stack = Stack(tmp_path_factory.mktemp("traced"), *flags, "--decode", "2", environ=environ)
    try:
        yield stack.start()
    finally:
        stack.close()


def prompt(seed: int) -> list[int]:
    """No cache holds it, and it is too long for a local prefill by choice."""
    return [20_000 + 400 * seed + i for i in range(400)]


def body(seed: int, **fields: Any) -> dict[str, Any]:
    given = {"max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, **fields}
    return {"model": "smollm2", "prompt": prompt(seed), **given}


def of_trace(receiver: OtlpReceiver, trace_id: str) -> list[Span]:
    return [span for span in receiver.spans if span.context.trace_id.hex() == trace_id]


def instance_of(receiver: OtlpReceiver, span: Span) -> str:
    (found,) = (item.resource for item in receiver.received if item.span is span)
    return str(found["service.instance.id"]).rpartition("-")[0]


def test_a_stream_that_outlives_its_decode_worker_is_one_tree_over_four_processes(
    traced: Stack, receiver: OtlpReceiver
) -> None:
    wall_began = time.time()
    received = 0
    with traced.http() as http, http.stream("POST", "/v1/completions", json=body(1, stream=True), headers=HEADERS) as r:
        assert r.status_code == 200
        for line in r.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            received += len(json.loads(line[6:])["choices"])
            if received == 4:
                with traced.http() as other:
                    placements = other.get("/v1/cluster").json()["gateway"]["placement"]["smollm2"]["latest"]
                victim = traced.worker(placements[0]["decode"])
                assert victim is not None
                os.kill(victim["pid"], signal.SIGKILL)
    wall_ended = time.time()
    expected = Counter({"POST /v1/completions": 1, "attempt": 2, "prefill": 2, "decode": 1})
    receiver.wait_for(lambda: Counter(span.name for span in of_trace(receiver, CALLER[0])) >= expected)
    tree = Tree(of_trace(receiver, CALLER[0]), above=bytes.fromhex(CALLER[1]), num_dead=1)
    tree.check_times(CLOCKS_S)
    assert {span.context.state for span in tree.spans} == {"congo=t61"}
    lost, second = tree.named("attempt")
    assert lost.error == "decode_gone"
    assert second.attributes["kvferry.outcome"] == "length"
    assert lost.attributes["kvferry.decode"] != second.attributes["kvferry.decode"]
    told = {instance_of(receiver, span) for span in tree.spans}
    told.add(str(lost.attributes["kvferry.decode"]))  # the dead one could not tell of itself
    assert told == PROCESSES
    # Each span is of the process that its parent named.
    for attempt in (lost, second):
        for child in tree.children(attempt):
            assert instance_of(receiver, child) == attempt.attributes[f"kvferry.{child.name}"]
            for stage in tree.children(child):
                assert instance_of(receiver, stage) == instance_of(receiver, child)
    # Its times are those of the wall clock, and add up.
    root = tree.root
    assert wall_began - CLOCKS_S <= root.began <= root.ended <= wall_ended + CLOCKS_S
    assert root.ended - root.began <= wall_ended - wall_began + CLOCKS_S
    chunks = [span for span in tree.spans if span.name == "prefill chunk"]
    assert sum(int(span.attributes["kvferry.num_tokens"]) for span in chunks) >= len(prompt(1))  # type: ignore[arg-type]
    assert all(0 < span.ended - span.began < wall_ended - wall_began for span in chunks)
    assert root.attributes["gen_ai.usage.output_tokens"] == MAX_TOKENS


def test_a_receiver_that_fails_costs_spans_and_nothing_else(traced: Stack, receiver: OtlpReceiver) -> None:
    eventually(lambda: len([row for row in traced.workers() if row["state"] == "ready"]) == 3)
    with traced.http() as http:
        whole = http.post("/v1/completions", json=body(2, max_tokens=8)).raise_for_status().json()
        receiver.status = 400
        posts = receiver.num_posts
        again = http.post("/v1/completions", json=body(2, max_tokens=8)).raise_for_status().json()
        receiver.wait_for(lambda: receiver.num_posts > posts)
        assert again["choices"] == whole["choices"]
        failed = eventually(lambda: failures(http.get("/metrics").text))
        assert failed > 0
        receiver.status = 200
        http.post("/v1/completions", json=body(3, max_tokens=8), headers=fresh("a1")).raise_for_status()
    receiver.wait_for(lambda: bool(of_trace(receiver, "a1" * 16)))


def failures(metrics: str) -> float:
    found = [line for line in metrics.splitlines() if line.startswith('kvferry_span_total{outcome="failed"}')]
    return float(found[0].split()[1]) if found else 0.0


def fresh(byte: str) -> dict[str, str]:
    return {"traceparent": f"00-{byte * 16}-{byte * 8}-01"}


def test_spans_that_wait_are_sent_before_a_process_ends(traced: Stack, receiver: OtlpReceiver) -> None:
    with traced.http() as http:
        http.post("/v1/completions", json=body(4, max_tokens=8), headers=fresh("b2")).raise_for_status()
    assert traced.stop() == 0
    tree = Tree(of_trace(receiver, "b2" * 16), above=bytes.fromhex("b2" * 8))
    assert {"attempt", "prefill", "decode", "generation", "KV fetch"} <= {span.name for span in tree.spans}
