"""Workers, bus and gateway killed, frozen and drained under running requests, as real processes: two prefill and two
decode workers (`scene.py`)."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from bench.prompts import Prompts
from bench.tap import Attempt, Heard
from books import Books, Row, books_of, cluster, seconds_until_clean, violations, whole
from scene import MAX_MODEL_LEN, SHORT, STREAM_S, TRIES, Running, Scene, frozen, pause_after, pid_of, send, set_scene
from stack import Stack

from kvferry.engine.reference import ReferencePass
from kvferry.runtime import blocking_clock
from kvferry_local.bench.endpoint import ServerError

NEW_PAIR_S = 2.0  # from a kill until a new pair has accepted
SHORT_PAUSE_S = 2.5  # from a kill until the next token: at most 256 tokens of context and an idle survivor
CANCELLED_S = 1.0  # from a client's disconnect until all blocks are free
GATEWAY_GONE_S = 5.0  # from a gateway's kill until all of its blocks are free
FENCED_S = 3.0  # from a frozen worker's first words until it has heard that its work is elsewhere
LONG = 1600  # prompt tokens
ENDLESS = MAX_MODEL_LEN - SHORT  # tokens of a stream that somebody ends before its time
NEVER = "\x00never"  # a stop string that no text holds: the stop path runs, and nothing is cut

GREEDY = {"temperature": 0.0}
SEEDED = {"temperature": 0.8, "top_p": 0.95, "seed": 11}
STOPPING = {"temperature": 0.7, "top_k": 40, "seed": 5, "stop": [NEVER, "\x00also"]}


@pytest.fixture(scope="module")
def fleet(flags: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Two prefill and two decode workers; no prompt is prefilled on a decode worker by choice."""
    environ = {"KVFERRY_LOCAL_PREFILL_THRESHOLD": "0"}
    stack = Stack(tmp_path_factory.mktemp("fleet"), *flags, "--prefill", "2", "--decode", "2", environ=environ)
    try:
        yield stack.start()
    finally:
        stack.close()


@pytest.fixture
async def scene(fleet: Stack, model_dir: Path, prompts: Prompts, judge: ReferencePass) -> AsyncIterator[Scene]:
    async for scene in set_scene(fleet, 4, model_dir, prompts, judge):
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
