"""One run of each kind against one gateway: what it costs per token, per request, flat out, and how late a token is."""

from __future__ import annotations

import asyncio
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench.gateway_clients import Answer, Clients
from bench.gateway_servers import Server
from bench.options import MODEL_NAME
from bench.processes import Process
from bench.prompts import Prompts
from kvferry.runtime import blocking_clock
from kvferry.text.model_dir import ModelDir
from kvferry.text.tokenizer import Tokenizer

PROMPT_TOKENS: Final = 256
NUM_PROMPTS: Final = 64
RATE: Final = 50.0  # tokens a second of each stream
SETTLE_S: Final = 1.0
SLACK_S: Final = 3.0  # tokens beyond the window, for a server whose streams begin one after the other
FLAT_STREAMS: Final = 256
FLAT_TOKENS: Final = 2000  # of each; that many can wait for a client that is slow
AT_ONCE: Final = 8  # requests under way while requests are counted
WARM_UP: Final = 20


def texts(model_dir: Path) -> list[str]:
    """To ask with: of about `PROMPT_TOKENS`, the same in every run."""
    made, tokenizer = Prompts(model_dir, seed=9), Tokenizer(ModelDir(model_dir))
    return [tokenizer.decode(made.tokens(PROMPT_TOKENS)) for _ in range(NUM_PROMPTS)]


@dataclass(frozen=True, slots=True)
class Cost:
    """Of a process over a span of time. Seconds."""

    total: float
    user: float
    system: float


class Meter:
    """What a process has cost since."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self._total = process.scheduled_seconds()
        self._user, self._system = process.user_and_system()

    def read(self) -> Cost:
        user, system = self._process.user_and_system()
        return Cost(self._process.scheduled_seconds() - self._total, user - self._user, system - self._system)


@dataclass(frozen=True, slots=True)
class Paced:
    """Of streams that all run, at a pace that leaves the gateway time."""

    cost: Cost
    bus: Cost | None
    num_tokens: int  # in the window
    rate: float  # of each stream
    events_per_token: float  # of whole answers
    event_bytes: float
    added_ms: Sequence[float]  # from the batch to the client, of each token; none where nobody says when it was said


async def paced(server: Server, streams: int, window: float, prompts: Sequence[str], event_bytes: int) -> Paced:
    num_tokens = int(RATE * (SETTLE_S + window + SLACK_S))
    await server.ready()
    clients = await Clients.open(server.port, streams, MODEL_NAME, prompts)
    try:
        answers = await clients.begin(num_tokens)
        running = asyncio.ensure_future(server.run(RATE, streams, num_tokens, event_bytes))
        await asyncio.sleep(SETTLE_S)
        meter, bus = Meter(server.gateway), None if server.beside is None else Meter(server.beside)
        start = blocking_clock()
        await asyncio.sleep(window)
        cost, bus_cost = meter.read(), None if bus is None else bus.read()
        end = blocking_clock()
        published = await running
        await clients.end()
    finally:
        clients.close()
    arrivals = {answer.label: answer.arrivals() for answer in answers}
    inside = sum(start <= moment < end for moments in arrivals.values() for moment in moments)
    told = sum(answer.num_tokens() for answer in answers) if server.tells_usage else streams * (num_tokens + 1)
    events = sum(map(len, arrivals.values()))
    return Paced(
        cost, bus_cost, inside, inside / (end - start) / streams, events / told,
        sum(answer.num_bytes for answer in answers) / events,
        _added(arrivals.values(), published, start, end) if published else (),
    )  # fmt: skip


def _added(
    streams: Iterable[Sequence[float]], published: Sequence[float], start: float, end: float
) -> tuple[float, ...]:
    """Milliseconds. Token 0 is the prefill worker's."""
    return tuple(
        (moment - published[index]) * 1e3
        for moments in streams
        for index, moment in enumerate(moments)
        if index and start <= moment < end
    )


async def flat_out(server: Server, prompts: Sequence[str]) -> Cost:
    """Of `FLAT_STREAMS` × `FLAT_TOKENS` tokens that are there at once, their requests' beginning not counted."""
    await server.ready()
    clients = await Clients.open(server.port, FLAT_STREAMS, MODEL_NAME, prompts)
    try:
        answers = await clients.begin(FLAT_TOKENS)
        meter = Meter(server.gateway)
        await server.run(0, FLAT_STREAMS, FLAT_TOKENS, 0)
        await clients.end()
        cost = meter.read()
    finally:
        clients.close()
    lacking = [answer.label for answer in answers if answer.num_tokens() != FLAT_TOKENS]
    if lacking:
        raise RuntimeError(f"flat out: {len(lacking)} streams lack tokens")
    return cost


async def requests(server: Server, count: int, prompts: Sequence[str]) -> Cost:
    """Of `count` requests for one token, several at once."""
    await server.ready()
    clients = await Clients.open(server.port, AT_ONCE, MODEL_NAME, prompts)
    try:
        await clients.one_after_the_other(WARM_UP, 1)
        meter = Meter(server.gateway)
        _check(await clients.one_after_the_other(count, 1))
        return meter.read()
    finally:
        clients.close()


async def added_to_one(server: Server, count: int, prompts: Sequence[str]) -> float:
    """Median milliseconds of a request for one token, from its first byte to the answer's last, one at a time."""
    await server.ready()
    clients = await Clients.open(server.port, 1, MODEL_NAME, prompts)
    try:
        await clients.one_after_the_other(WARM_UP, 1)
        answers = _check(await clients.one_after_the_other(count, 1))
        return statistics.median(answer.ended - answer.sent for answer in answers) * 1e3
    finally:
        clients.close()


def _check(answers: list[Answer]) -> list[Answer]:
    for answer in answers:
        if answer.num_tokens() != 1:
            raise RuntimeError(f"{answer.label}: {answer.num_tokens()} tokens for one")
    return answers
