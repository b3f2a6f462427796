"""One cluster, two numerics ids of one KV format: in `exact` a request's tokens all come from the one it began on.

The twins of two numerics say that their KV has one format, and give different tokens for the same text. So a single
step, frame or cached block of the other one shows in what the client gets.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cluster import settled
from disturbances import chance_of, needing
from gateway_core import Call
from scripted_worker import text_of
from workload import MODEL, requests
from world import World, simulate

from kvferry.engine.memory import MemorySettings

A, B = replace(MODEL, numerics="-a"), replace(MODEL, numerics="-b")


async def start(world: World, *, decode_a: int = 2, **settings: object) -> None:
    """One prefill worker of each numerics, and decode workers of both."""
    for name, model in (("a", A), ("b", B)):
        await world.prefill(f"prefill-{name}", model, **settings)
        for number in range(decode_a if model is A else 2):
            await world.decode(f"decode-{name}{number}", model, **settings)


def origin(call: Call) -> MemorySettings | None:
    """The numerics of which all of a call's tokens are; None: of neither alone."""
    for model in (A, B):
        answer = call.request.answer(model)
        if call.tokens == answer and call.client.text == text_of(answer):
            return model
    return None


def check_origins(calls: list[Call]) -> None:
    mixed = [call.request.number for call in calls if origin(call) is None]
    assert not mixed, f"tokens of two numerics, or wrong ones, in {mixed}"


@pytest.mark.parametrize("seed", range(4))
def test_each_request_stays_on_the_numerics_that_it_began_on_when_workers_die(seed: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await start(world)
        await world.start(prefill=0, decode=0, gateways=2)
        offering = asyncio.create_task(world.offer(requests(seed, 60)))
        await asyncio.sleep(chance.uniform(0.5, 3.0))
        # All may be killed but the last decode worker of each: prompts can be prefilled there, too.
        victims = chance.sample([w for w in world.workers if not w.settings.name.endswith("1")], 2)
        for victim in victims:
            await settled(lambda victim=victim: bool(needing(world, victim)), within=5.0)
            await world.kill(victim)
        await offering
        await world.all_over()
        check_origins(world.calls)
        assert {origin(call) for call in world.calls if len(call.tokens) > 4} == {A, B}, "both have served"
        assert sum(core.fleet.metrics.value("kvferry_token_mismatch_total") for core in world.cores) == 0

    simulate(seed, scenario)


@pytest.mark.parametrize("seed", range(3))
def test_preempted_requests_come_back_to_their_numerics(seed: int) -> None:
    async def scenario(world: World) -> None:
        for name, model in (("a", A), ("b", B)):
            small = replace(model, num_blocks=20)
            await world.prefill(f"prefill-{name}", small)
            await world.decode(f"decode-{name}", small)
        await world.start(prefill=0, decode=0, gateways=2)
        await world.offer(requests(seed, 50, max_prompt=192, seconds=0.5))
        await world.all_over()
        check_origins(world.calls)
        assert sum(w.metrics.value("kvferry_preemption_total") for w in world.workers) > 0

    simulate(seed, scenario)


def bound_to_a(world: World) -> list[Call]:
    """Calls that have tokens of A and are under way."""
    return [
        call
        for call in world.calls
        if call.outcome == "open" and call.stream is not None and call.stream.tokens
        and call.flight is not None and call.flight._bound_to == "memory1-a-memory"
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_requests_wait_for_their_numerics_to_come_back_and_the_cluster_says_why(seed: int) -> None:
    async def scenario(world: World) -> None:
        await start(world, decode_a=1)
        await world.start(prefill=0, decode=0)
        offering = asyncio.create_task(world.offer(requests(seed, 40)))
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
        offering = asyncio.create_task(world.offer(requests(2, 40)))
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
        await world.offer(requests(1, 30))
        await world.all_over()
        with pytest.raises(AssertionError, match="tokens of two numerics"):
            check_origins(world.calls)

    simulate(1, scenario)
