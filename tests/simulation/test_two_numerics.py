"""One cluster, two numerics ids of one KV format: in `exact` a request's tokens all come from the one it began on.

The twins of two numerics say that their KV has one format, and give different tokens for the same text. So a single
step, frame or cached block of the other one shows in what the client gets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from clients import Call
from cluster import settled
from disturbances import chance_of, live_attempts, needing
from scripted_worker import text_of
from workload import MAX_TOKENS, MODEL, ClientRequest, requests
from world import World, check_answered, seen, simulate, total

from kvferry.engine.memory.runner import MemorySettings

A, B = replace(MODEL, numerics="-a"), replace(MODEL, numerics="-b")


class Kept:
    """What came, to be judged at the end: either numerics is right, but not both in one answer."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.text = ""

    def take(self, text: str, token_ids: Sequence[int] | None, logprobs: Sequence[object]) -> None:
        self.text += text
        self.tokens += token_ids or ()

    def end(self, reason: str) -> None:
        assert reason in ("stop", "length")

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


async def start(world: World, *, decode_a: int = 2, **settings: object) -> None:
    """One prefill worker of each numerics, and decode workers of both."""
    world.make_checks = lambda request: [Kept()]
    for name, model in (("a", A), ("b", B)):
        await world.prefill(f"prefill-{name}", model, **settings)
        for number in range(decode_a if model is A else 2):
            await world.decode(f"decode-{name}{number}", model, **settings)


def origin(call: Call) -> MemorySettings | None:
    """The numerics of which all of a call's tokens are; None: of neither alone."""
    for model in (A, B):
        answer = call.request.answer(model)
        if call.tokens == answer and call.checks[0].text == text_of(answer):
            return model
    return None


def load(seed: int, count: int, **options: float) -> list[ClientRequest]:
    """Requests that tell their token ids."""
    return [replace(request, wants_ids=True) for request in requests(seed, count, **options)]  # type: ignore[arg-type]


def check_origins(calls: list[Call]) -> None:
    mixed = [call.request.number for call in calls if origin(call) is None]
    assert not mixed, f"tokens of two numerics, or wrong ones, in {mixed}"


@pytest.mark.parametrize("seed", range(2))
def test_each_request_stays_on_the_numerics_that_it_began_on_when_workers_die(seed: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await start(world)
        await world.start(prefill=0, decode=0, gateways=2)
        offering = asyncio.create_task(world.offer(load(seed, 60)))
        await asyncio.sleep(chance.uniform(0.5, 3.0))
        # All may be killed but the last decode worker of each: prompts can be prefilled there, too.
        mortal = [worker for worker in world.workers if not worker.settings.name.endswith("1")]
        for _ in range(2):
            await settled(lambda: any(needing(world, worker) for worker in mortal), within=5.0)
            victim = chance.choice([worker for worker in mortal if needing(world, worker)])
            mortal.remove(victim)
            await world.kill(victim)
        await offering
        await world.all_over()
        check_origins(world.calls)
        assert {origin(call) for call in world.calls if len(call.tokens) > 4} == {A, B}, "both have served"
        assert seen(world, "kvferry_token_mismatch_total") == 0

    simulate(seed, scenario)


@pytest.mark.parametrize("seed", range(1))
def test_preempted_requests_come_back_to_their_numerics(seed: int) -> None:
    async def scenario(world: World) -> None:
        for name, model in (("a", A), ("b", B)):
            small = replace(model, num_blocks=20)
            await world.prefill(f"prefill-{name}", small)
            await world.decode(f"decode-{name}", small)
        world.make_checks = lambda request: [Kept()]
        await world.start(prefill=0, decode=0, gateways=2)
        await world.offer(load(seed, 50, max_prompt=192, seconds=0.5, long_tokens=MAX_TOKENS))
        await world.all_over()
        check_origins(world.calls)
        check_answered(world.calls)
        assert total(world, "kvferry_preemption_total") > 0

    simulate(seed, scenario)


def bound_to_a(world: World) -> list[Call]:
    """Calls that have tokens of A and are under way."""
    return [
        call
        for call, flight, _ in live_attempts(world)
        if flight.stream.tokens and flight._bound_to == "memory1-a-memory"
    ]


@pytest.mark.parametrize("seed", range(1))
def test_requests_wait_for_their_numerics_to_come_back_and_the_cluster_says_why(seed: int) -> None:
    async def scenario(world: World) -> None:
        await start(world, decode_a=1)
        await world.start(prefill=0, decode=0)
        offering = asyncio.create_task(world.offer(load(seed, 40)))
        await settled(lambda: len(bound_to_a(world)) >= 2, within=5.0)
        victim = next(w for w in world.workers if w.settings.name == "decode-a0")
        await world.kill(victim)
        fleet = world.cores[0].fleet
        await settled(lambda: len(fleet.waiting) >= 2, within=3.0)
        assert all("memory1-a-memory" in unit.why for unit in fleet.waiting.values())
        await offering
        await settled(lambda: sum(call.outcome == "open" for call in world.calls) == len(fleet.waiting), within=20.0)
        assert fleet.waiting, "B is idle, and they still wait"
        await world.decode("decode-a0", A)
        await world.all_over()
        assert not fleet.waiting
        check_origins(world.calls)

    simulate(seed, scenario)


def test_without_their_numerics_requests_end_in_an_error_that_names_it_and_show_nothing_wrong() -> None:
    async def scenario(world: World) -> None:
        await start(world, decode_a=1)
        await world.start(prefill=0, decode=0, gateway_replace_wait=3.0)
        offering = asyncio.create_task(world.offer(load(2, 40)))
        await settled(lambda: len(bound_to_a(world)) >= 2, within=5.0)
        await world.kill(next(w for w in world.workers if w.settings.name == "decode-a0"))
        await offering
        await world.all_over()
        lost = [call for call in world.calls if call.outcome == "numerics_gone"]
        assert len(lost) >= 2
        for call in lost:
            assert call.tokens == call.request.answer(A)[: len(call.tokens)]
        check_origins([call for call in world.calls if call not in lost])

    simulate(2, scenario)


def test_where_the_workers_run_fast_the_check_finds_mixed_tokens() -> None:
    """Negative control: an equal KV format is enough for `fast`, so two numerics do meet in one request there."""

    async def scenario(world: World) -> None:
        await start(world, exactness="fast")
        await world.start(prefill=0, decode=0)
        await world.offer(load(1, 30))
        await world.all_over()
        with pytest.raises(AssertionError, match="tokens of two numerics"):
            check_origins(world.calls)

    simulate(1, scenario)
