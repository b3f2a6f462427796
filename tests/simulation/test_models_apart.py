"""One cluster, two models of one KV format: nothing but its model's name says where a request may go.

The twins of both say that their KV has one format, and give different tokens for the same text, under `fast` rules that
would let them pair. So a single request, frame or cached block that strays shows in what the client gets.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from answers import ExactCheck
from cluster import settled
from disturbances import chance_of, needing
from workload import MODEL, MODEL_NAME, ClientRequest, requests
from world import World, check_answered, seen, simulate

from kvferry.worker.worker import Worker

OTHER_NAME = "other"
MODELS = {MODEL_NAME: MODEL, OTHER_NAME: replace(MODEL, numerics="-b")}


def load(seed: int, count: int) -> list[ClientRequest]:
    """Every other request is for the other model; prompts are shared by both."""
    return [replace(r, model=OTHER_NAME if r.number % 2 else MODEL_NAME) for r in requests(seed, count)]


async def start(world: World, names: tuple[str, ...] = tuple(MODELS)) -> None:
    """A prefill and two decode workers of each model. `names`: which of the models, in this order."""
    world.model_names = tuple(MODELS)
    world.make_checks = lambda request: [ExactCheck(e) for e in request.expected_on(MODELS[request.model])]
    for at, name in enumerate(names):
        own = {"served_model_name": name, "exactness": "fast"}
        await world.prefill(f"prefill-{at}", MODELS[name], **own)
        for number in range(2):
            await world.decode(f"decode-{2 * at + number}", MODELS[name], **own)


async def _needed(world: World, names: tuple[str, ...]) -> Worker[Any]:
    """The first of these workers that a request can't do without."""
    workers = [worker for name in names if (worker := world.worker(name)) is not None]
    await settled(lambda: any(needing(world, worker) for worker in workers), within=5.0)
    return next(worker for worker in workers if needing(world, worker))


@pytest.mark.parametrize("seed", range(3))
def test_whatever_dies_and_returns_with_another_model_each_request_is_answered_by_its_own(seed: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await start(world)
        await world.start(prefill=0, decode=0, gateways=2)
        offering = asyncio.create_task(world.offer(load(seed, 40)))
        await asyncio.sleep(chance.uniform(0.5, 2.0))
        # One decode worker of each model dies in the middle of its requests and comes back as one of the other model.
        for names, model in ((("decode-0", "decode-1"), OTHER_NAME), (("decode-2", "decode-3"), MODEL_NAME)):
            victim = await _needed(world, names)
            await world.kill(victim)
            name = victim.settings.name
            await world.decode(name, MODELS[model], served_model_name=model, exactness="fast")
        await offering
        await world.all_over()
        check_answered(world.calls)
        for model in MODELS:
            assert seen(world, "kvferry_replacement_total", model=model) > 0
            assert seen(world, "kvferry_request_total", model=model, outcome="ok") == 20
        assert seen(world, "kvferry_token_mismatch_total") == 0

    simulate(seed, scenario)


def test_a_worker_with_another_model_under_the_name_of_the_first_is_found() -> None:
    """Negative control: where the names lie, a request does get the other model's tokens, and its client notices."""

    async def scenario(world: World) -> None:
        world.model_names = (MODEL_NAME,)
        await world.decode("decode-0", MODELS[OTHER_NAME], served_model_name=MODEL_NAME)
        await world.start(prefill=0, decode=0)
        await world.offer(requests(3, 10))
        await world.all_over()
        with pytest.raises(AssertionError):
            check_answered(world.calls)
        world.calls.clear()

    simulate(3, scenario)
