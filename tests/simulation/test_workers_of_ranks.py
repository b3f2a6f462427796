"""Workers of several ranks, of different degrees on the two sides: all answers as ever, whatever befalls a rank."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from cluster import settled
from disturbances import live_attempts, needing, replaced
from faults import STATES
from planes import fingerprint
from processes import run_as
from workload import requests
from world import World, check_answered, seen, simulate, total

from kvferry.engine.ranks.following import DirectChannel
from kvferry.worker.worker import Worker

DEGREES = {"prefill-0": 2, "prefill-1": 3, "decode-0": 3, "decode-1": 2}
STEP_TIMEOUT_S = 1.0
REMOTE = pytest.mark.parametrize("num_remote", [0, 1], ids=["here", "elsewhere"])  # the rank that is lost is the last


async def started(world: World, num_remote: int = 0) -> None:
    """`num_remote`: of the ranks of each worker."""
    for name, ranks in DEGREES.items():
        start = world.prefill if name.startswith("prefill") else world.decode
        await start(name, tensor_parallel_size=ranks, remote_ranks=num_remote, step_timeout=STEP_TIMEOUT_S)
    await world.start(prefill=0, decode=0, gateways=2)


async def caught(world: World, phase: str) -> Worker[Any]:
    """A worker that has a live request in this phase."""

    def victim() -> Worker[Any] | None:
        live = {attempt.ticket for _, _, attempt in live_attempts(world)}
        for worker in world.workers:
            for sequence in worker.scheduler.sequences.values():
                if sequence.state in STATES[phase] and sequence.work.ticket in live and needing(world, worker):
                    return worker
        return None

    await settled(lambda: victim() is not None, within=5.0)
    found = victim()
    assert found is not None
    return found


def test_undisturbed_every_pair_of_degrees_gives_the_tokens_of_one_rank() -> None:
    async def scenario(world: World) -> None:
        await started(world)
        await world.offer(requests(0, 60))
        await world.all_over()
        check_answered(world.calls)
        assert total(world, "kvferry_pull_total", outcome="received") >= 20
        assert [worker.settings.tensor_parallel_size for worker in world.workers] == list(DEGREES.values())

    simulate(0, scenario)


@REMOTE
@pytest.mark.parametrize("phase", STATES)
def test_a_rank_that_dies_takes_its_worker_down_and_the_requests_have_a_new_pair_within_2_s(
    phase: str, num_remote: int
) -> None:
    async def scenario(world: World) -> None:
        await started(world, num_remote)
        offering = asyncio.create_task(world.offer(requests(3, 40)))
        await asyncio.sleep(0.3)
        victim = await caught(world, phase)
        affected = needing(world, victim)
        rank = world.runtime.ranks[victim.settings.name].numbers[-1]
        await world.lose_rank(victim, rank)
        assert victim not in world.workers
        await replaced(affected, victim)
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(3, scenario)


def test_a_worker_that_has_lost_a_rank_fails_no_request_before_it_ends() -> None:
    """It would be asked again at once, and fail that as fast: a request's failures were used up in no time."""

    async def scenario(world: World) -> None:
        await started(world)
        offering = asyncio.create_task(world.offer(requests(4, 40)))
        await asyncio.sleep(0.3)
        victim = await caught(world, "held")
        await settled(lambda: victim.engine_loop._step_began is None, within=0.5)  # else that step never ends
        ranks = world.runtime.ranks[victim.settings.name]
        ranks.kill(ranks.numbers[-1])
        await asyncio.sleep(0.5)  # much longer than a process takes to hear of it
        assert seen(world, "kvferry_replacement_total", reason="error") == 0
        await world.kill(victim)
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(4, scenario)


@REMOTE
@pytest.mark.parametrize("name", DEGREES)
def test_a_drained_worker_of_ranks_ends_under_load_and_loses_nothing(name: str, num_remote: int) -> None:
    """As SIGTERM does, while it has requests and others come."""

    async def scenario(world: World) -> None:
        await started(world, num_remote)
        offering = asyncio.create_task(world.offer(requests(5, 60)))
        await settled(lambda: (found := world.worker(name)) is not None and bool(needing(world, found)), within=5.0)
        victim = world.worker(name)
        assert victim is not None
        holding = len(victim.scheduler.sequences)

        async def ending() -> None:
            await victim.drain()
            assert not victim.scheduler.sequences
            world.workers.remove(victim)
            await victim.stop()

        await run_as(name, ending())
        assert holding > 0
        assert not world.runtime.ranks[name].lost
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(5, scenario)


def test_a_stopped_rank_delays_its_workers_step_and_changes_no_token() -> None:
    async def scenario(world: World) -> None:
        await started(world)
        offering = asyncio.create_task(world.offer(requests(1, 30)))
        victim = await caught(world, "running")
        ranks = world.runtime.ranks[victim.settings.name]
        ranks.stop(1)
        await settled(lambda: victim.engine_loop._step_began is not None, within=0.5)
        steps = victim.engine_loop.num_steps
        await asyncio.sleep(STEP_TIMEOUT_S / 2)
        assert victim.engine_loop.num_steps == steps
        ranks.resume(1)
        await settled(lambda: victim.engine_loop.num_steps > steps, within=0.5)
        await offering
        await world.all_over()
        check_answered(world.calls)
        assert not victim.wedged.is_set()

    simulate(1, scenario)


def test_a_worker_whose_rank_stays_stopped_is_wedged_and_its_requests_are_placed_anew() -> None:
    async def scenario(world: World) -> None:
        await started(world)
        offering = asyncio.create_task(world.offer(requests(2, 30)))
        victim = await caught(world, "running")
        affected = needing(world, victim)
        world.runtime.ranks[victim.settings.name].stop(1)
        async with asyncio.timeout(3 * STEP_TIMEOUT_S):
            await victim.wedged.wait()
        await world.kill(victim)
        await replaced(affected, victim)
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(2, scenario)


def test_a_rank_that_misses_a_step_is_noticed_by_the_client_that_gets_its_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative control of the clients' checks."""
    send, missed = DirectChannel.send, []

    def skipping(channel: DirectChannel, payload: bytes) -> None:
        if len(missed) < 3 and b"step" in payload:
            missed.append(fingerprint(payload))
        else:
            send(channel, payload)

    async def scenario(world: World) -> None:
        await world.prefill("prefill-0", tensor_parallel_size=2)
        await world.decode("decode-0")
        await world.start(prefill=0, decode=0)
        monkeypatch.setattr(DirectChannel, "send", skipping)
        await world.offer(requests(1, 20))
        await world.all_over()
        assert missed
        assert sum(bool(call.wrong) for call in world.calls) >= 1
        for call in world.calls:
            call.wrong = ""

    simulate(1, scenario)
