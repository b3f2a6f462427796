"""The clients of the gateway's benchmark count what came, however it was cut, and a write loop is a real server."""

from __future__ import annotations

import json
from typing import Any

import pytest
from bench import gateway_runs
from bench.gateway_clients import Answer, GatewayError
from bench.gateway_servers import floor


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}}])


STREAM = b"".join(
    [
        b"HTTP/1.1 200 OK\r\n\r\n", text_event(""), text_event("a"), text_event(" b"),
        event(choices=[{"delta": {}, "finish_reason": "length"}]),
        event(choices=[], usage={"completion_tokens": 2}), b"data: [DONE]\n\n",
    ]
)  # fmt: skip


@pytest.mark.parametrize("size", [1, 7, 64, 4096])
def test_only_events_with_text_count_and_each_came_with_its_last_byte(size: int) -> None:
    cuts = range(0, len(STREAM), size)
    answer = Answer("r", 0.0, [(float(at), STREAM[at : at + size]) for at in cuts])
    ends = [STREAM.index(text) + STREAM[STREAM.index(text) :].index(b"\n") for text in (b'"a"', b'" b"')]
    assert answer.arrivals() == [float(end // size * size) for end in ends]
    assert answer.num_tokens() == 2
    assert answer.num_bytes == len(STREAM)


def test_an_answer_with_an_error_or_without_usage_makes_no_figure() -> None:
    with pytest.raises(GatewayError, match="too much"):
        Answer("r", 0.0, [(1.0, text_event("a") + event(error={"message": "too much"}))]).arrivals()
    with pytest.raises(GatewayError, match="no usage"):
        Answer("r", 0.0, [(1.0, text_event("a"))]).num_tokens()


async def test_the_write_loop_writes_as_often_and_as_much_as_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway_runs, "SETTLE_S", 0.1)
    monkeypatch.setattr(gateway_runs, "SLACK_S", 0.1)
    async with floor() as server:
        run = await gateway_runs.paced(server, 2, 0.4, ["hello"], 300)
    assert run.events_per_token == 1
    assert run.num_tokens > 0
    assert run.cost.total > 0
    assert 290 < run.event_bytes < 330
