"""Workers, bus and gateway killed, frozen and drained under running requests, as real processes.

Two prefill and two decode workers. Every token id is heard on the bus (`watch.py`), so "none lost, none twice" is
about tokens and not about text; the client's text must be exactly theirs, and the reference pass judges it whole.

An engine may be ten times as fast as the one that these tests were first run with, and the machine busy with other
things. So a blow that must fall in mid-stream is repeated if the stream was over before it fell (`TRIES`), streams
that are cut off have far more tokens to give than anybody waits for, and a bound is one on what the stack itself does
(`bench/contention.py`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_cluster import timeless
from bench.contention import Contention
from bench.prompts import Prompts
from bench.tap import Attempt, Heard, bus_of
from books import HOST, Books, Row, books_of, cluster, port_of, seconds_until_clean, violations, whole
from runners import Runner, native_library
from stack import Stack
from tokenizers import Tokenizer
from watch import Watch

from kvferry.engine.native.library import LibraryUnavailable, open_library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.reference import ReferencePass
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import Endpoint, ServerError
from kvferry_local.bench.stream import Stream, stream

MAX_MODEL_LEN = 2048
NEW_PAIR_S = 2.0  # from a kill until a new pair has accepted
SHORT_PAUSE_S = 2.5  # from a kill until the next token: at most 256 tokens of context and an idle survivor
CANCELLED_S = 1.0  # from a client's disconnect until all blocks are free
GATEWAY_GONE_S = 5.0  # from a gateway's kill until all of its blocks are free
FENCED_S = 3.0  # from a frozen worker's first words until it has heard that its work is elsewhere
SETTLE_S = 10.0  # for the books after a test
STREAM_S = 150.0  # until a stream is read to its end, on a slow and busy machine
TRIES = 5  # of what a fast engine may have done before the test could act
SHORT, LONG = 96, 1600  # prompt tokens
ENDLESS = MAX_MODEL_LEN - SHORT  # tokens of a stream that somebody ends before its time
NEVER = "\x00never"  # a stop string that no text holds: the stop path runs, and nothing is cut

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
STOPPING = {"temperature": 0.7, "top_k": 40, "seed": 5, "stop": [NEVER, "\x00also"]}


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


@pytest.fixture(scope="module")
def fleet(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two prefill and two decode workers; no prompt is prefilled on a decode worker by choice."""
    environ = {"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"}
    stack = Stack(tmp_path_factory.mktemp("fleet"), *flags, "--prefill", "2", "--decode", "2", environ=environ)
    try:
        yield stack.start()
    finally:
        stack.close()


@pytest.fixture(scope="module")
def judge(model_dir: Path) -> Iterator[ReferencePass]:
    """On the workers' engine: another one's rounding is within ε on processors with bf16, and not on all others."""
    settings = EngineSettings(
        model_dir, num_blocks=MAX_MODEL_LEN // 16, block_size=16, max_model_len=MAX_MODEL_LEN, threads=1
    )
    runner: Runner
    try:
        runner = NativeRunner(settings, library=open_library())
    except LibraryUnavailable:
        runner = TorchRunner(settings)
    yield ReferencePass(runner)
    runner.close()


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> Prompts:
    return Prompts(model_dir, seed=7)


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


@pytest.fixture
async def scene(fleet: Stack, model_dir: Path, prompts: Prompts, judge: ReferencePass) -> AsyncIterator[Scene]:
    async for scene in set_scene(fleet, 4, model_dir, prompts, judge):
        yield scene


@pytest.fixture
async def lone_pair(stack: Stack, model_dir: Path, prompts: Prompts, judge: ReferencePass) -> AsyncIterator[Scene]:
    async for scene in set_scene(stack, 2, model_dir, prompts, judge):
        yield scene


# -- the checks themselves can fail ----------------------------------------------------------------------------


async def test_the_check_of_the_books_sees_what_is_held(scene: Scene) -> None:
    clean = await books_of(scene.rows[0])
    assert violations(clean) == []
    total = clean["num_blocks"]

    def planted(**changes: Any) -> Books:
        return {**deepcopy(clean), **changes}

    leaks: list[Books] = [
        planted(counts={**clean["counts"], "held": 3}),
        planted(counts={"free": total - 1, "cached": 0}),
        planted(slots={"free": 15, "retired": 1}),
        planted(holdings=[{"attempt": 1, "num_blocks": 2}]),
        planted(sequences=1),
        planted(streams=1),
    ]
    assert all(violations(books) for books in leaks)
    running = scene.start(SHORT, ENDLESS)
    request = await scene.watch.given(running.label, 5)
    held = violations(await books_of(scene.row(request, "decode")))
    assert any("blocks are running" in problem for problem in held)
    with pytest.raises(AssertionError, match="blocks are running"):
        await seconds_until_clean(scene.rows, blocking_clock(), lambda: 0.1)


async def test_the_judge_refuses_a_token_that_was_swapped(scene: Scene) -> None:
    request = await scene.complete(scene.start(SHORT, 16, **GREEDY))
    swapped = request.generated
    swapped[8] = (swapped[8] + 1) % 49152
    assert not scene.judge.check(request.prompt, swapped, request.sampling, 0).accepted


# -- a decode worker is killed ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "moment"),
    [(GREEDY, 1), (SEEDED, 24), (STOPPING, 70)],
    ids=["greedy, with its first token", "seeded, in mid-stream", "seeded with stop strings, later"],
)
async def test_a_decode_worker_is_killed_under_a_short_stream(
    scene: Scene, sampling: dict[str, Any], moment: int, record_property: Any
) -> None:
    for _ in range(TRIES):
        running = scene.start(SHORT, 256 - SHORT, **sampling)
        request = await scene.watch.given(running.label, moment)
        killed = send(scene.row(request, "decode"), signal.SIGKILL)
        await scene.complete(running)
        if len(request.attempts) > 1:
            break
        await scene.recover()  # it had given its last token
    pair_s, pause_s = scene.new_pair_after(request, killed), pause_after(running, killed)
    record_property("new_pair_s", pair_s)
    record_property("pause_s", pause_s)
    assert pair_s <= scene.bound(killed, NEW_PAIR_S)
    assert pause_s <= scene.bound(killed, SHORT_PAUSE_S)


async def test_a_decode_worker_is_killed_under_several_streams_while_one_is_fetched(
    scene: Scene, record_property: Any
) -> None:
    streams, busy = [], set[int]()
    for sampling in (GREEDY, SEEDED, STOPPING, GREEDY, SEEDED, STOPPING):  # until each of the two has one to lose
        streams.append(scene.start(SHORT, 500, **sampling))
        request = await scene.watch.given(streams[-1].label, 4)
        busy.add(request.last.workers["decode"])
        if len(busy) == 2:
            break
    assert len(busy) == 2
    for _ in range(TRIES):
        streams.append(scene.start(LONG // 2, 16, **SEEDED))
        if (victim := await scene.fetching(streams[-1])) is not None:
            break
    assert victim is not None
    killed = send(victim, signal.SIGKILL)
    lost = int(victim["incarnation"], 16)
    # A stream may have given its last token just before; the others must have been on that worker.
    hit = [r for r in streams if scene.watch.requests[r.label].on(lost) and not r.task.done()]
    requests = [await scene.complete(running) for running in streams]
    again = {r.label for r, request in zip(streams, requests, strict=True) if len(request.attempts) > 1}
    assert streams[-1].label in again  # the one that was fetched
    assert len(again) >= 2  # and one that was running there
    assert again <= {running.label for running in hit}
    pair_s = max(scene.new_pair_after(scene.watch.requests[label], killed) for label in again)
    record_property("new_pair_s", pair_s)
    assert pair_s <= scene.bound(killed, NEW_PAIR_S)


# -- a prefill worker is killed --------------------------------------------------------------------------------


async def test_a_prefill_worker_is_killed_while_it_computes_and_holds_a_queue(
    scene: Scene, record_property: Any
) -> None:
    for _ in range(TRIES):
        running = [scene.start(LONG // 2, 6, **sampling) for sampling in (GREEDY, SEEDED, STOPPING, GREEDY, SEEDED)]
        requests = [await scene.watch.accepted(r.label) for r in running]
        places = [request.last.workers["prefill"] for request in requests]
        crowded = max(set(places), key=places.count)
        hit = [request for request, place in zip(requests, places, strict=True) if place == crowded]
        assert len(hit) >= 3  # one computing, two queued; the first ones may have been computed meanwhile
        killed = send(scene.row(hit[0], "prefill"), signal.SIGKILL)
        hit = [request for request in hit if not request.last.tokens]
        if len(hit) >= 2:
            break
        await asyncio.gather(*(scene.complete(r) for r in running))
        await scene.recover()
    assert len(hit) >= 2
    for r in running:
        await scene.complete(r)
    pair_s = max(scene.new_pair_after(request, killed) for request in hit)
    record_property("new_pair_s", pair_s)
    assert pair_s <= scene.bound(killed, NEW_PAIR_S)


async def test_a_prefill_worker_is_killed_in_mid_stream_of_the_kv(scene: Scene, record_property: Any) -> None:
    for _ in range(TRIES):
        running = scene.start(LONG, 8, **SEEDED)
        fetching = await scene.fetching(running)
        request = scene.watch.requests[running.label]
        killed = send(scene.row(request, "prefill"), signal.SIGKILL)
        await scene.complete(running)
        if fetching is not None and len(request.attempts) > 1:
            break
        await scene.recover()  # its last frame had left
    pair_s = scene.new_pair_after(request, killed)
    record_property("new_pair_s", pair_s)
    assert pair_s <= scene.bound(killed, NEW_PAIR_S)


async def test_a_prefill_worker_is_killed_right_after_its_first_token(scene: Scene, record_property: Any) -> None:
    running = scene.start(LONG, 8, **SEEDED)
    request = await scene.watch.given(running.label, 1)
    killed = send(scene.row(request, "prefill"), signal.SIGKILL)
    await scene.complete(running)
    if len(request.attempts) == 1:
        return  # all of its KV had arrived: once D runs, P's death changes nothing
    pair_s = scene.new_pair_after(request, killed)
    record_property("new_pair_s", pair_s)
    assert pair_s <= scene.bound(killed, NEW_PAIR_S)


# -- frozen, then continued ------------------------------------------------------------------------------------


@dataclass
class Freeze:
    """A worker that was stopped under a request until that had a new pair, and then went on."""

    running: Running
    request: Heard
    row: Row
    first: Attempt  # the one that it was stopped under
    moment: float
    thawed: float


async def freeze(scene: Scene, role: str, running: Running, first_token: int) -> Freeze | None:
    """Stop a worker once its request has so many tokens. None: it had no more to do for it by then."""
    request = await scene.watch.given(running.label, first_token) if first_token else None
    request = request or await scene.watch.accepted(running.label)
    row, first = scene.row(request, role), request.last
    incarnation = int(row["incarnation"], 16)
    with frozen(row) as moment:
        hit = await scene.in_time(running, lambda: request.last is not first and request.last.accepted_at is not None)
        if hit and role == "decode":
            await scene.in_time(running, lambda: len(request.last.tokens) > 8)
        beats = scene.watch.beats[incarnation]
    thawed = blocking_clock()
    await scene.watch.until(lambda: scene.watch.beats[incarnation] > beats + 1)  # it speaks again
    return Freeze(running, request, row, first, moment, thawed) if hit else None


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_frozen_worker_counts_as_killed_and_is_fenced_off(
    scene: Scene, role: str, record_property: Any
) -> None:
    for _ in range(TRIES):
        if role == "decode":
            found = await freeze(scene, role, scene.start(SHORT, 256 - SHORT, **SEEDED), 10)
        else:
            found = await freeze(scene, role, scene.start(LONG, 8, **GREEDY), 0)
        if found is not None:
            break
    assert found is not None
    freed_s = await seconds_until_clean([found.row], found.thawed, lambda: scene.bound(found.thawed, FENCED_S))
    await scene.complete(found.running)
    pair_s, pause_s = scene.new_pair_after(found.request, found.moment), pause_after(found.running, found.moment)
    record_property("new_pair_s", pair_s)
    record_property("pause_s", pause_s)
    record_property("freed_s", freed_s)
    assert pair_s <= scene.bound(found.moment, NEW_PAIR_S)
    if role == "decode":
        assert pause_s <= scene.bound(found.moment, SHORT_PAUSE_S)
    else:
        assert not found.first.tokens  # it did not compute to the end for nobody
    assert found.row["pid"] in {back["pid"] for back in await whole(scene.stack, 4)}  # it was not restarted


# -- asked to go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["decode", "prefill"])
async def test_a_worker_that_is_asked_to_end_drains_under_its_streams(scene: Scene, role: str) -> None:
    running = scene.start(SHORT, 60, **GREEDY) if role == "decode" else scene.start(LONG, 8, **GREEDY)
    request = await scene.watch.accepted(running.label)
    if role == "decode":
        await scene.watch.given(running.label, 8)
    row = scene.row(request, role)
    send(row, signal.SIGTERM)
    await scene.complete(running)
    while row["incarnation"] in {back["incarnation"] for back in await cluster(scene.stack)}:
        await asyncio.sleep(0.05)
    await whole(scene.stack, 4)


# -- the client goes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase", ["queued or computing", "fetching", "running"])
async def test_a_client_disconnects_and_all_blocks_are_free_within_a_second(
    scene: Scene, phase: str, record_property: Any
) -> None:
    match phase:
        case "queued or computing":
            running = [scene.start(LONG, 400) for _ in range(3)]
            for r in running:
                await scene.watch.accepted(r.label)
        case "fetching":
            for _ in range(TRIES):
                running = [scene.start(LONG, 400)]
                if await scene.fetching(running[0]) is not None:
                    break
                running[0].task.cancel()
        case _:
            running = [scene.start(SHORT, ENDLESS), scene.start(SHORT, ENDLESS, **SEEDED)]
            for r in running:
                await scene.watch.given(r.label, 10)
    assert any([violations(await books_of(row)) for row in scene.rows])
    for r in running:
        assert not r.task.done()
        r.task.cancel()  # closes its connection
    gone = blocking_clock()
    freed_s = await seconds_until_clean(scene.rows, gone, lambda: scene.bound(gone, CANCELLED_S))
    record_property("freed_s", freed_s)


# -- the bus and the gateway -----------------------------------------------------------------------------------


async def test_streams_go_on_when_nats_is_killed_and_restarted(scene: Scene, record_property: Any) -> None:
    num_tokens = 400
    streams = [scene.start(SHORT, num_tokens, **GREEDY), scene.start(SHORT, num_tokens, **SEEDED)]
    for running in streams:
        await scene.watch.given(running.label, 10)
    killed = blocking_clock()
    os.kill(pid_of(scene.stack, "nats-server"), signal.SIGKILL)
    assert not any(running.task.done() for running in streams)
    async with asyncio.timeout(STREAM_S):
        answers = await asyncio.gather(*(running.task for running in streams))
    pauses = [pause_after(running, killed) for running in streams]
    record_property("pause_s", max(pauses))
    for answer in answers:
        assert answer.usage is not None
        assert answer.usage["completion_tokens"] == num_tokens
    await whole(scene.stack, 4)
    await scene.complete(scene.start(SHORT, 8, **GREEDY))


async def test_workers_free_what_a_killed_gateway_had(scene: Scene, record_property: Any) -> None:
    running = [scene.start(SHORT, ENDLESS, **GREEDY), scene.start(LONG, 400, **SEEDED)]
    await scene.watch.given(running[0].label, 5)
    await scene.watch.accepted(running[1].label)
    assert any([violations(await books_of(row)) for row in scene.rows])
    killed = blocking_clock()
    os.kill(pid_of(scene.stack, "kvferry_gateway"), signal.SIGKILL)
    freed_s = await seconds_until_clean(scene.rows, killed, lambda: scene.bound(killed, GATEWAY_GONE_S))
    record_property("freed_s", freed_s)
    for r in running:
        with pytest.raises((ServerError, OSError, asyncio.IncompleteReadError)):
            await r.task
    assert [row["pid"] for row in await whole(scene.stack, 4)] != []
    await scene.complete(scene.start(SHORT, 8, **GREEDY))


async def test_with_one_of_each_a_stream_waits_for_the_restart(lone_pair: Scene, record_property: Any) -> None:
    running = lone_pair.start(SHORT, 300, **SEEDED)
    request = await lone_pair.watch.given(running.label, 10)
    killed = send(lone_pair.row(request, "decode"), signal.SIGKILL)
    await lone_pair.complete(running)
    record_property("pause_s", pause_after(running, killed))
    assert len({attempt.workers["decode"] for attempt in request.attempts.values()}) == 2


# -- ports -----------------------------------------------------------------------------------------------------


LEVELS = {
    "type": "object",
    "properties": {"levels": {"type": "array", "items": {"enum": ["low", "high"]}, "minItems": 60, "maxItems": 90}},
    "required": ["levels"],
    "additionalProperties": False,
}
TOOL = {"name": "set", "parameters": LEVELS}
TAG = {"structures": [{"begin": "<f=a>", "schema": LEVELS, "end": "</f>"}], "triggers": ["<"]}
CHATS, TEXTS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"


def requests_of_every_kind(prompt: list[int], tag_opener: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Label -> (path, body). Each has some hundred tokens to give."""
    said = {"messages": [{"role": "user", "content": "Set the levels."}], "max_tokens": 200}
    text = {"prompt": prompt, "max_tokens": 200, "ignore_eos": True}
    return {
        "tools": (CHATS, {**said, "tools": [{"type": "function", "function": TOOL}], "tool_choice": "required"}),
        "responses": (
            RESPONSES,
            {
                "input": "Set the levels.",
                "max_output_tokens": 200,
                "tools": [{"type": "function", **TOOL}],
                "tool_choice": {"type": "function", "name": "set"},
            },
        ),
        "structural_tag": (
            TEXTS,
            {**text, "structured_outputs": {"structural_tag": TAG}, "logit_bias": {str(tag_opener): 100}},
        ),
        "best_of": (TEXTS, {**text, "best_of": 2, "temperature": 0.9, "seed": 3}),
        "prompt_logprobs": (TEXTS, {**text, "prompt_logprobs": 2}),
        "echo": (TEXTS, {**text, "echo": True, "logprobs": 1}),
    }


async def test_every_kind_of_answer_is_the_same_after_its_decode_worker_was_killed(lone_pair: Scene) -> None:
    native_library()  # or skip: the torch engine is not exact
    scene = lone_pair
    kinds = requests_of_every_kind(scene.prompts.tokens(SHORT), scene.tokenizer.token_to_id("<"))

    async with httpx.AsyncClient(base_url=scene.stack.url, timeout=STREAM_S, trust_env=False) as http:

        async def ask(kind: str, label: str) -> Any:
            path, body = kinds[kind]
            asked = {"model": "smollm2", "temperature": 0, **body}
            response = await http.post(path, json=asked, headers={"x-request-id": label})
            assert response.status_code == 200, response.text
            return timeless(response.json())

        undisturbed = {kind: await ask(kind, f"undisturbed-{kind}") for kind in kinds}
        for attempt in range(TRIES):
            asking = {kind: asyncio.create_task(ask(kind, f"{kind}-{attempt}")) for kind in kinds}
            for kind in kinds:
                await scene.watch.given(f"{kind}-{attempt}", 8)
            in_time = not any(task.done() for task in asking.values())
            send(next(row for row in scene.rows if row["role"] == "decode"), signal.SIGKILL)
            found = {kind: await task for kind, task in asking.items()}
            for kind in kinds:
                assert found[kind] == undisturbed[kind], kind
            if in_time:
                break
            await scene.recover()
    assert in_time, "no answer was under way when the worker was killed"


def test_every_port_is_a_known_one_and_bound_to_this_machine(fleet: Stack) -> None:
    open_ports = {pid: listeners([pid]) for pid in fleet.processes()}
    for row in fleet.workers():
        ports = {port for _, port in open_ports.pop(row["pid"])}
        own = {row["debug_port"], int(row["address"][0].rsplit(":", 1)[1])}
        assert own < ports if row["transport"] == "ucx" else own == ports
        assert len(ports - own) == (row["transport"] == "ucx")  # UCX's TCP transport has a port of its own
    rest = {port for addresses in open_ports.values() for _, port in addresses}
    assert rest == {port_of(fleet), int(fleet.facts.nats_url.rsplit(":", 1)[1])}
    assert {address for address, _ in listeners(fleet.processes())} == {"127.0.0.1"}


def test_a_port_that_is_open_to_all_would_be_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)) as planted:
        assert ("0.0.0.0", planted.getsockname()[1]) in listeners([os.getpid()])


def listeners(pids: Any) -> set[tuple[str, int]]:
    """(address, port) of every listening TCP socket of these processes: what `ss -ltnp` shows of them."""
    sockets = set()
    for pid in pids:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                sockets.add(entry.readlink().name)
            except FileNotFoundError:
                continue
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in sockets:
                address, port = local.split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add((socket.inet_ntop(family, b"".join(words)), int(port, 16)))
    return found
