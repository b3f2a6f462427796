"""A whole stack as real processes, on whose bus a test listens, and whose texts are judged.

Every token id is heard on the bus (`watch.py`), so "none lost, none twice" is about tokens and not about text; the
client's text must be exactly theirs, and the reference pass judges it whole.

An engine may be ten times as fast as the one that the tests were first run with, and the machine busy with other
things. So a blow that must fall in mid-stream is repeated if the stream was over before it fell (`TRIES`), streams
that are cut off have far more tokens to give than anybody waits for, and a bound is one on what the stack itself does
(`bench/contention.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench.contention import Contention
from bench.prompts import Prompts
from bench.tap import Heard, bus_of
from books import HOST, Row, books_of, port_of, seconds_until_clean, whole
from stack import Stack
from tokenizers import Tokenizer
from watch import Watch

from kvferry.engine.reference import ReferencePass
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint
from kvferry_local.bench.stream import Stream, stream

MAX_MODEL_LEN = 2048
SETTLE_S = 10.0  # for the books after a test
STREAM_S = 150.0  # until a stream is read to its end, on a slow and busy machine
TRIES = 5  # of what a fast engine may have done before the test could act
SHORT = 96  # prompt tokens


@dataclass
class Running:
    """A request under way: what its client has so far, and the task that reads on."""

    label: str
    max_tokens: int
    task: asyncio.Task[Stream]
    so_far: Stream = field(default_factory=Stream)


@dataclass
class Scene:
    """A whole stack, its workers, an ear on its bus, and a judge of its texts."""

    stack: Stack
    watch: Watch
    rows: list[Row]  # of the workers, as the test began
    prompts: Prompts
    judge: ReferencePass
    tokenizer: Tokenizer
    contention: Contention
    started: list[Running] = field(default_factory=list)

    def start(self, tokens: int, max_tokens: int, **fields: Any) -> Running:
        """Stream a completion of a fresh prompt. It generates exactly `max_tokens`."""
        label = f"r{len(self.started)}"
        body = {
            "model": "smollm2", "prompt": self.prompts.tokens(tokens), "max_tokens": max_tokens,
            "ignore_eos": True, **fields,
        }  # fmt: skip
        so_far = Stream()
        endpoint = Endpoint(HOST, port_of(self.stack))
        reading = stream(endpoint, "/v1/completions", body, headers={"x-request-id": label}, into=so_far)
        running = Running(label, max_tokens, asyncio.create_task(reading), so_far)
        self.started.append(running)
        return running

    def row(self, request: Heard, role: str) -> Row:
        """The worker of a role that a request is on."""
        incarnation = f"{request.last.workers[role]:016x}"
        return next(row for row in self.rows if row["incarnation"] == incarnation)

    async def complete(self, running: Running) -> Heard:
        """Read a stream to its [DONE] and hold it to all that is promised of it."""
        async with asyncio.timeout(STREAM_S):
            answer = await running.task
        await self.watch.given(running.label, running.max_tokens)
        request = self.watch.requests[running.label]
        tokens = request.generated
        assert len(tokens) == running.max_tokens
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == running.max_tokens
        assert answer.finish_reason == "length"
        assert answer.text == self.tokenizer.decode(tokens)
        verdict = await asyncio.to_thread(self.judge.check, request.prompt, tokens, request.sampling, request.choice)
        assert verdict.accepted, f"a token is {verdict.largest_gap:.2f} logit off"
        return request

    async def in_time(self, running: Running, condition: Callable[[], bool]) -> bool:
        """Wait for what must happen while a stream runs. False: the stream was over first."""
        await self.watch.until(lambda: condition() or running.task.done())
        if running.task.done():
            running.task.result()  # it may have failed
        return condition()

    async def recover(self) -> None:
        """Wait for the restart of what a blow that came too late has killed."""
        self.rows = await whole(self.stack, len(self.rows))
        self.contention.follow(self.stack.processes())

    async def fetching(self, running: Running) -> Row | None:
        """The decode worker of a request while it fetches its KV; None: it has fetched all, or no longer needs to."""
        request = await self.watch.accepted(running.label)
        row = self.row(request, "decode")
        while not request.last.tokens:
            if (await books_of(row))["counts"]["fetching"]:
                return row
            await asyncio.sleep(0.005)
        return None

    def bound(self, moment: float, seconds: float) -> float:
        """What a time that is bounded by `seconds`, from `moment` on, may be on this machine now."""
        return seconds + self.contention.granted(moment, seconds)

    def new_pair_after(self, request: Heard, moment: float) -> float:
        """Seconds until a placement after `moment` was accepted. Raises AssertionError if there was none."""
        later = [
            a.accepted_at for a in request.attempts.values() if a.accepted_at is not None and a.accepted_at > moment
        ]
        assert later, "it was not placed again"
        return min(later) - moment


def pause_after(running: Running, moment: float) -> float:
    """The longest time after `moment` for which the client had no new text, in seconds."""
    later = [moment, *(arrival for arrival in running.so_far.arrivals if arrival > moment)]
    return max(after - before for before, after in pairwise(later))


def send(row: Row, number: signal.Signals) -> float:
    """Send a signal; returns when."""
    os.kill(row["pid"], number)
    return blocking_clock()


@contextmanager
def frozen(row: Row) -> Iterator[float]:
    """SIGSTOP for the block, SIGCONT after it."""
    moment = send(row, signal.SIGSTOP)
    try:
        yield moment
    finally:
        os.kill(row["pid"], signal.SIGCONT)


def pid_of(stack: Stack, program: str) -> int:
    return next(
        pid for pid, command in stack.processes().items() if program in command and "kvferry_local" not in command
    )


async def set_scene(
    stack: Stack, num_workers: int, model_dir: Path, prompts: Prompts, judge: ReferencePass
) -> AsyncIterator[Scene]:
    """A whole stack for one test; afterwards it is whole again, and at rest its books are clean."""
    rows = await whole(stack, num_workers)
    await seconds_until_clean(rows, blocking_clock(), lambda: SETTLE_S)
    async with bus_of(stack.facts) as bus:
        watch = Watch(bus, stack.facts.cluster)
        await watch.start()
        tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
        contention = Contention(stack.processes())
        sampling = asyncio.create_task(contention.run())
        scene = Scene(stack, watch, rows, prompts, judge, tokenizer, contention)
        try:
            yield scene
        finally:
            sampling.cancel()
            for running in scene.started:
                running.task.cancel()
            await asyncio.gather(sampling, *(running.task for running in scene.started), return_exceptions=True)
    rows = await whole(stack, num_workers)
    await seconds_until_clean(rows, blocking_clock(), lambda: SETTLE_S)
    log = stack.log.read_text()
    assert "Traceback" not in log
    assert "Violation" not in log, "each role does with its rights"
