"""`kvferry bench` against a small real server whose answers are known."""

from __future__ import annotations

import asyncio
import json
import statistics
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kvferry.config.layers import load_settings
from kvferry.errors import SettingError
from kvferry_local.bench.client import Outcome, ask
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.picture import picture
from kvferry_local.bench.prompts import BLOCK_TOKENS, prompt
from kvferry_local.bench.service import bench
from kvferry_local.bench.summary import Summary, text
from kvferry_local.bench.trace import read_trace
from kvferry_local.bench.workload import PATTERNS, Pattern, Planned, fitted, generated
from kvferry_local.client import RequestFailed
from kvferry_local.settings import BenchSettings

NUM_TOKENS = 5
GAP_S = 0.02


class Server:
    """Answers every streaming request with `NUM_TOKENS` events, `GAP_S` apart; misbehaves as its prompt says."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.heads: list[str] = []
        self.most_at_once = 0
        self._now = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._now += 1
        self.most_at_once = max(self.most_at_once, self._now)
        try:
            await self._answer(reader, writer)
        finally:
            self._now -= 1
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        length = int(head.lower().split("content-length: ")[1].split("\r\n")[0])
        if head.startswith("GET /v1/models"):
            return self._whole(writer, 200, {"data": [{"id": "tiny"}]})
        body = json.loads(await reader.readexactly(length))
        self.bodies.append(body)
        trouble = body["model"]
        if trouble == "busy":
            return self._whole(writer, 429, {"error": {"message": "come back later"}})
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        for number in range(NUM_TOKENS):
            await asyncio.sleep(GAP_S)
            self._event(writer, {"choices": [{"text": f" {number}", "delta": {"content": str(number)}}]})
            if trouble == "dies" and number == 2:
                return None
            if trouble == "fails" and number == 2:
                self._event(writer, {"error": {"message": "worker lost"}})
        if trouble == "garbage":
            self._chunk(writer, b"data: {\n\n")
        usage = "many" if trouble == "counts badly" else {"prompt_tokens": 7, "completion_tokens": NUM_TOKENS}
        self._event(writer, {"choices": [], "usage": usage})
        if trouble != "unfinished":
            self._chunk(writer, b": comment\n\ndata: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        await writer.drain()
        return None

    def _event(self, writer: asyncio.StreamWriter, document: dict[str, Any]) -> None:
        self._chunk(writer, f"data: {json.dumps(document)}\n\n".encode())

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    @staticmethod
    def _whole(writer: asyncio.StreamWriter, status: int, document: dict[str, Any]) -> None:
        data = json.dumps(document).encode()
        writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


@asynccontextmanager
async def running() -> AsyncIterator[tuple[str, Server]]:
    server = Server()
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", server
    finally:
        listener.close()
        await listener.wait_closed()


def settings(**flags: object) -> BenchSettings:
    return load_settings(BenchSettings, config_file=None, environ={}, flags=flags)


# -- one request -----------------------------------------------------------------------------------------------------


async def test_a_whole_answer_is_timed_event_by_event() -> None:
    async with running() as (url, server):
        outcome = await ask(Endpoint.of(url, "hush"), "/completions", {"model": "m"}, 0.0, 30.0)
    assert outcome.error == ""
    assert len(outcome.arrivals) == outcome.output_tokens == NUM_TOKENS
    assert outcome.prompt_tokens == 7
    assert outcome.ttft_s >= GAP_S
    assert min(outcome.gaps) > 0
    assert sum(outcome.gaps) >= (NUM_TOKENS - 1) * GAP_S * 0.9
    assert outcome.tpot_s == pytest.approx(statistics.fmean(outcome.gaps))
    assert server.bodies[0]["stream"] is True
    assert "Authorization: Bearer hush" in server.heads[0]


@pytest.mark.parametrize(
    ("model", "error", "detail"),
    [
        ("busy", "HTTP 429", "come back later"),
        ("fails", "stream error", "worker lost"),
        ("dies", "connection", ""),
        ("unfinished", "cut short", "DONE"),
        ("garbage", "malformed", ""),
        ("counts badly", "malformed", ""),
    ],
)
async def test_what_is_no_whole_answer_is_counted_by_its_kind(model: str, error: str, detail: str) -> None:
    async with running() as (url, _):
        outcome = await ask(Endpoint.of(url, ""), "/completions", {"model": model}, 0.0, 30.0)
    assert outcome.error == error
    assert detail in outcome.detail


async def test_an_answer_that_takes_too_long_or_a_server_that_is_not_there_is_counted() -> None:
    async with running() as (url, _):
        outcome = await ask(Endpoint.of(url, ""), "/completions", {"model": "m"}, 0.0, GAP_S)
        assert outcome.error == "timeout"
    outcome = await ask(Endpoint.of(url, ""), "/completions", {"model": "m"}, 0.0, 30.0)
    assert outcome.error == "connection"


def test_an_endpoint_is_a_url_with_or_without_v1() -> None:
    assert Endpoint.of("http://h:1/v1/", "").path == "/v1"
    assert Endpoint.of("https://h/api", "").path == "/api/v1"
    assert (Endpoint.of("https://h", "").port, Endpoint.of("http://h", "").port) == (443, 80)
    assert Endpoint.of("https://h", "").tls is not None
    assert "hush" not in repr(Endpoint.of("http://h", "hush"))
    for url in ("h:1", "ftp://h", "http://", "http://h:port"):
        with pytest.raises(SettingError, match="--url"):
            Endpoint.of(url, "")


# -- loads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_keeps_its_mean_rate_and_its_seed(pattern: Pattern) -> None:
    planned = generated(pattern, 20.0, 4000, 300, 50, seed=3)
    assert planned == generated(pattern, 20.0, 4000, 300, 50, seed=3)
    assert planned != generated(pattern, 20.0, 4000, 300, 50, seed=4)
    assert [request.at for request in planned] == sorted(request.at for request in planned)
    assert len(planned) / planned[-1].at == pytest.approx(20.0, rel=0.2)
    assert statistics.median(request.prompt_tokens for request in planned) == pytest.approx(300, rel=0.05)
    assert statistics.median(request.output_tokens for request in planned) == pytest.approx(50, rel=0.05)


def test_bursts_come_in_halves_and_a_ramp_rises() -> None:
    bursts = Counter(request.at % 10 < 5 for request in generated("bursts", 50.0, 5000, 1, 1, 0))
    assert bursts[True] > 2 * bursts[False]
    ramp = generated("ramp", 50.0, 5000, 1, 1, 0)
    assert ramp[1000].at > 1.5 * (ramp[4999].at - ramp[3999].at)


def test_traces_are_read_in_the_forms_in_which_they_are_published(tmp_path: Path) -> None:
    azure = tmp_path / "a.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.6805900,0,109\n"
    )
    first, second = read_trace(azure)
    assert (first.prompt_tokens, first.output_tokens, second.prompt_tokens) == (374, 44, 1)
    assert second.at - first.at == pytest.approx(4.0)
    mooncake = tmp_path / "m.jsonl"
    mooncake.write_text(
        '{"timestamp": 3000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 0, "input_length": 10, "output_length": 1}\n'
    )
    assert read_trace(mooncake) == [Planned(0.0, 10, 1), Planned(3.0, 6758, 500, (0, 1))]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.csv", "TIME,ContextTokens,GeneratedTokens\n1,2,3\n", "line 1: no column TIMESTAMP"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,2,3\n", "line 2"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"),
        ("m.jsonl", '{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0}\n', "line 2: no field"),
        ("m.jsonl", "[\n", "line 1"),
        ("m.jsonl", '{"timestamp": 0, "input_length": null, "output_length": 1}\n', "line 1"),
    ],
)
def test_a_trace_that_cannot_be_read_is_named_with_its_line(
    tmp_path: Path, name: str, content: str, problem: str
) -> None:
    file = tmp_path / name
    file.write_text(content)
    with pytest.raises(SettingError, match=f"--trace: .*{problem}"):
        read_trace(file)
    with pytest.raises(SettingError, match="--trace"):
        read_trace(tmp_path / "none.csv")


def test_a_trace_is_played_faster_or_at_a_rate_and_shortened() -> None:
    trace = [Planned(100.0 + 2 * number, 1000, 100, (1,)) for number in range(11)]
    faster = fitted(trace, None, None, 4.0, 0.5)
    assert (faster[0].at, faster[-1].at) == (0.0, 5.0)
    assert (faster[0].prompt_tokens, faster[0].output_tokens) == (500, 50)
    at_rate = fitted(trace, 5, 10.0, 1.0, 1.0)
    assert len(at_rate) == 5
    assert at_rate[-1].at == pytest.approx(0.5)


def test_prompts_share_their_beginnings_as_the_trace_says() -> None:
    long, longer = Planned(0, 2 * BLOCK_TOKENS + 9, 1, (5, 6)), Planned(0, 3 * BLOCK_TOKENS, 1, (5, 6, 7))
    first, second, other = prompt(long, 0, 0), prompt(longer, 1, 0), prompt(Planned(0, 600, 1, (8,)), 2, 0)
    assert len(first.split()) == long.prompt_tokens
    shared = [a == b for a, b in zip(first.split(), second.split(), strict=False)]
    assert all(shared[: 2 * BLOCK_TOKENS])
    assert not all(shared[2 * BLOCK_TOKENS :])
    assert first.split()[:8] != other.split()[:8]
    assert prompt(Planned(0, 50, 1), 0, 0) != prompt(Planned(0, 50, 1), 1, 0)
    assert prompt(long, 0, 1) != first


# -- the summary -----------------------------------------------------------------------------------------------------


def outcome(ttft: float, gap: float, count: int = 11, sent: float = 0.0, error: str = "") -> Outcome:
    arrivals = [sent + ttft + number * gap for number in range(count)]
    return Outcome(sent, sent, arrivals, arrivals[-1], 100, count, error)


def test_goodput_counts_whole_answers_within_both_targets() -> None:
    outcomes = [outcome(0.5, 0.01), outcome(2.0, 0.01), outcome(0.5, 0.1), outcome(0.5, 0.01, error="HTTP 500")]
    summary = Summary.of(outcomes, 1.0, 0.05)
    assert summary.goodput == 0.25
    assert (summary.num_requests, summary.num_whole, summary.errors) == (4, 3, {"HTTP 500": 1})
    assert summary.seconds == pytest.approx(2.1)
    assert summary.output_tokens_per_s == pytest.approx(33 / 2.1)
    assert summary.ttft is not None
    assert (summary.ttft.p50, summary.ttft.max) == (0.5, 2.0)
    assert summary.itl is not None
    assert summary.itl.p99 == pytest.approx(0.1)
    printed = text(summary)
    for word in ("TTFT", "ITL", "goodput: 25.0%", "1 × HTTP 500"):
        assert word in printed


@pytest.mark.parametrize("outcomes", [[outcome(0.5, 0.01)], [outcome(0.5, 0.0, 1)], [outcome(1, 1, error="timeout")]])
def test_a_picture_is_drawn_of_anything(outcomes: list[Outcome]) -> None:
    drawn = ET.fromstring(picture("a <model>", Summary.of(outcomes, 1.0, 0.05), outcomes))
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
    assert drawn.findtext("{http://www.w3.org/2000/svg}title") == "a <model>"
    whole = sum(not outcome.error for outcome in outcomes)
    assert len(drawn.findall("{http://www.w3.org/2000/svg}circle")) == whole


# -- the command -----------------------------------------------------------------------------------------------------


async def test_a_load_is_put_on_and_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {"json_file": tmp_path / "out.json", "svg": tmp_path / "out.svg"}
    async with running() as (url, server):
        assert await bench(settings(url=url, requests=8, rate=40, prompt_tokens=9, ignore_eos=True, **files))
    assert "8 of 8 requests whole" in capsys.readouterr().out
    assert len(server.bodies) == 8
    assert {body["model"] for body in server.bodies} == {"tiny"}
    assert all(body["ignore_eos"] for body in server.bodies)
    document = json.loads(files["json_file"].read_text())
    assert document["summary"]["num_whole"] == len(document["requests"]) == 8
    assert document["summary"]["ttft"]["p50"] >= GAP_S
    ET.fromstring(files["svg"].read_text())


async def test_so_many_clients_ask_at_once_and_no_more() -> None:
    async with running() as (url, server):
        assert await bench(settings(url=url, requests=9, concurrency=3, endpoint="chat"))
        assert server.most_at_once == 3
    assert all(body["messages"][0]["role"] == "user" for body in server.bodies)
    assert not any("ignore_eos" in body for body in server.bodies)


async def test_a_load_of_which_nothing_is_answered_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with running() as (url, _):
        assert not await bench(settings(url=url, requests=2, rate=100, served_model_name="busy"))
    said = capsys.readouterr()
    assert "2 × HTTP 429" in said.out
    assert "come back later" in said.err


async def test_a_place_that_cannot_be_reached_or_written_is_named_before_the_load(tmp_path: Path) -> None:
    with pytest.raises(RequestFailed, match=r"--url: http://127\.0\.0\.1:1 lists no model"):
        await bench(settings(url="http://127.0.0.1:1", requests=1))
    with pytest.raises(SettingError, match="--json"):
        await bench(settings(url="http://127.0.0.1:1", json_file=tmp_path / "no" / "file"))
