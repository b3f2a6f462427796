"""One disturbance at a time, and the time within which it must be over: `design.md`'s table, bound by bound.

Every scenario ends in the same check: each client has exactly its answer, every worker's blocks, slots and books are
clean, and no table of a gateway remembers anything.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from cluster import all_free, settled
from disturbances import CANCEL_TO_FREE_S, chance_of, holds, live_attempts, needing, replaced
from workload import MODEL, requests
from world import World, check_answered, remembers, seen, simulate, total

from kvferry.runtime import now

FREE_AFTER_GATEWAY_S = 5.0  # from a gateway's end


def test_undisturbed_all_answers_come_and_nothing_is_repaired() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=2, decode=2, gateways=2)
        await world.offer(requests(0, 100))
        await world.all_over()
        check_answered(world.calls)
        assert len(world.calls) == 100
        assert sum(call.refusals for call in world.calls) == 0
        assert seen(world, "kvferry_token_mismatch_total") == 0
        assert seen(world, "kvferry_resend_total", cause="gap") == 0
        # Otherwise the scenario would not show what it is for.
        assert total(world, "kvferry_pull_total", outcome="received") >= 40
        assert seen(world, "kvferry_placement_total", kind="local") >= 20
        assert sum(worker.scheduler.memory.hit_tokens for worker in world.workers) > 1000

    simulate(0, scenario)


@pytest.mark.parametrize("seed", range(4))
def test_when_a_worker_is_killed_its_requests_have_a_new_pair_within_2_s(seed: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await world.start(prefill=2, decode=2, gateways=2)
        offering = asyncio.create_task(world.offer(requests(seed, 50)))
        await asyncio.sleep(chance.uniform(0.2, 3.0))
        victim = world.workers[seed]
        await settled(lambda: bool(needing(world, victim)), within=5.0)
        affected = needing(world, victim)
        await world.kill(victim)
        await replaced(affected, victim)
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(seed, scenario)


@pytest.mark.parametrize("deaf", [False, True], ids=["heard", "dropped"])
@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_what_a_worker_says_after_a_freeze_reaches_no_client(role: str, deaf: bool) -> None:
    """It finds the fence in its queue when it wakes; or speaks first, because the server dropped that."""

    async def scenario(world: World) -> None:
        chance = chance_of(1)
        await world.start(prefill=2, decode=2, gateways=2)
        offering = asyncio.create_task(world.offer(requests(1, 50)))
        await asyncio.sleep(chance.uniform(0.2, 2.0))
        victim = chance.choice([worker for worker in world.workers if worker.role == role])
        await settled(lambda: bool(needing(world, victim)) and victim.scheduler.num_running > 0, within=5.0)
        affected = needing(world, victim)
        world.freeze(victim.settings.name, deaf=deaf)
        await replaced(affected, victim)
        await asyncio.sleep(chance.uniform(0.0, 3.0))
        late = seen(world, "kvferry_late_row_total")
        world.thaw(victim.settings.name)
        if role == "decode" and deaf:
            await settled(lambda: seen(world, "kvferry_late_row_total") > late, within=1.0)
        await settled(lambda: not any(holds(victim, attempt) for _, _, attempt in affected), within=2.0)
        await offering
        await world.all_over()
        check_answered(world.calls)
        assert all(len(core.fleet.registry) == 4 for core in world.cores), "it serves again"

    simulate(1, scenario)


def test_a_worker_that_was_stopped_for_longer_than_a_step_may_take_is_not_wedged() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=2, step_timeout=1.0)
        offering = asyncio.create_task(world.offer(requests(1, 20, seconds=1.0)))
        victim = world.workers[0]
        await settled(lambda: victim.engine_loop._step_began is not None, within=5.0)
        world.freeze(victim.settings.name)
        await asyncio.sleep(3.0)
        world.thaw(victim.settings.name)
        await settled(lambda: victim.engine_loop._step_began is None, within=1.0)
        await offering
        await world.all_over()
        check_answered(world.calls)
        assert victim.state == "ready"
        assert not victim.wedged.is_set()

    simulate(1, scenario)


@pytest.mark.parametrize("number", range(2))
def test_with_one_pair_the_streams_wait_for_the_restart(number: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(number)
        await world.start(prefill=1, decode=1)
        offering = asyncio.create_task(world.offer(requests(number, 40)))
        await asyncio.sleep(chance.uniform(0.2, 3.0))
        victim = world.workers[number]
        await settled(lambda: bool(needing(world, victim)), within=5.0)
        await world.kill(victim)
        await asyncio.sleep(chance.uniform(1.0, 5.0))
        start = world.prefill if victim.role == "prefill" else world.decode
        await start(victim.settings.name)
        await offering
        await world.all_over()
        check_answered(world.calls)

    simulate(number, scenario)


@pytest.mark.parametrize("seed", range(2))
def test_when_clients_leave_their_blocks_are_free_within_1_s(seed: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(seed)
        await world.start(prefill=2, decode=2, gateways=2)
        offering = asyncio.create_task(world.offer(requests(seed, 60)))
        leaving: list[asyncio.Task[float]] = []
        while not offering.done():
            await asyncio.sleep(chance.uniform(0.02, 0.2))
            staying = [live for live in live_attempts(world) if not live[0].has_left]
            if staying:
                call, _, attempt = chance.choice(staying)
                call.leave()

                def freed(attempt: object = attempt) -> bool:
                    return not any(holds(worker, attempt) for worker in world.workers)  # type: ignore[arg-type]

                leaving.append(asyncio.create_task(settled(freed, CANCEL_TO_FREE_S)))
        await offering
        await asyncio.gather(*leaving)
        await world.all_over()
        assert len(leaving) >= 15
        check_answered([call for call in world.calls if not call.has_left])

    simulate(seed, scenario)


def test_bad_kv_frames_are_counted_and_never_reach_a_sequence() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=2, decode=2)
        world.network.faults.corruption = 0.06
        await world.offer(requests(1, 60))
        await world.all_over()
        check_answered(world.calls)
        assert world.network.faults.applied > 0
        kinds = ("checksum", "header", "short", "long", "identity")
        counted = sum(total(world, "kvferry_transfer_failure_total", kind=kind) for kind in kinds)
        assert 0 < counted <= world.network.faults.applied, "the rest came when its pull was over"

    simulate(1, scenario)


def test_pools_that_are_far_too_small_for_the_load_delay_it_and_nothing_else() -> None:
    async def scenario(world: World) -> None:
        small = replace(MODEL, num_blocks=20)  # 320 tokens
        for number in range(2):
            await world.prefill(f"prefill-{number}", small)
            await world.decode(f"decode-{number}", small)
        await world.start(prefill=0, decode=0, gateways=2)
        # 60 % of a pool is the longest prompt, and its output must fit, too.
        load = [request for request in requests(0, 50, max_prompt=192, seconds=0.5) if request.sampling.max_tokens < 60]
        await world.offer(load)
        await world.all_over()
        check_answered(world.calls)
        assert total(world, "kvferry_preemption_total") > 0

    simulate(0, scenario)


@pytest.mark.parametrize("number", range(2))
def test_when_a_gateway_is_killed_its_blocks_are_free_within_5_s_and_its_clients_ask_the_other(number: int) -> None:
    async def scenario(world: World) -> None:
        chance = chance_of(number)
        await world.start(prefill=2, decode=2, gateways=2)
        # All requests are there before the kill: the rest of the load could hide what is left.
        await world.offer(requests(number, 40, seconds=1.0))
        await asyncio.sleep(chance.uniform(0.0, 0.5))
        victim = world.cores[number]
        affected = [live for live in live_attempts(world) if live[0].gateway is victim]
        attempts = [attempt for _, _, attempt in affected]
        assert any(holds(worker, attempt) for worker in world.workers for attempt in attempts)
        await world.kill_gateway(victim)
        await settled(
            lambda: not any(holds(worker, attempt) for worker in world.workers for attempt in attempts),
            within=FREE_AFTER_GATEWAY_S,
        )
        await world.all_over()
        check_answered(world.calls)
        assert all(call.deaths == 1 for call, _, _ in affected)

    simulate(number, scenario)


def test_streams_go_on_when_the_bus_was_away_for_3_s() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=2, decode=2, gateways=2)
        offering = asyncio.create_task(world.offer(requests(1, 50)))
        await asyncio.sleep(1.5)
        world.broker.stop()
        await asyncio.sleep(3.0)
        world.broker.restart()
        back = now()
        await settled(lambda: all(worker.bus.connected for worker in world.workers), within=1.5)
        await offering
        await world.all_over()
        check_answered(world.calls)
        assert now() - back < 10.0
        assert seen(world, "kvferry_worker_gone_total") == 0, "nobody was judged while nobody could be heard"

    simulate(1, scenario)


def test_the_end_of_a_scenario_notices_a_worker_that_remembers_an_ended_request() -> None:
    """Negative control of `simulate`."""

    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1)
        deaf = world.workers[1]
        deaf.outbox.acknowledge = lambda gateway, streams: None  # type: ignore[method-assign]
        deaf.outbox.close = lambda work: None  # type: ignore[method-assign]
        await world.offer(requests(1, 5))
        await world.all_over()
        check_answered(world.calls)
        assert remembers(deaf)
        assert all_free(*world.workers)

    with pytest.raises(AssertionError, match="not within"):
        simulate(1, scenario)


def test_one_flipped_bit_of_kv_that_no_checksum_sees_is_noticed_by_the_client_that_gets_its_tokens() -> None:
    """Negative control of the clients' checks: the bit is flipped in P's copy before the frame is sealed."""

    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1)
        runner = world.workers[0].runner
        gather = runner.gather

        def flipping(piece: object, block_table: object, out: memoryview) -> None:
            gather(piece, block_table, out)  # type: ignore[arg-type]
            out[len(out) // 2] ^= 1
            runner.gather = gather  # type: ignore[method-assign]  # once

        runner.gather = flipping  # type: ignore[method-assign, assignment]
        await world.offer(requests(1, 20))
        await world.all_over()
        assert sum(bool(call.wrong) for call in world.calls) >= 1
        assert total(world, "kvferry_transfer_failure_total") == 0
        for call in world.calls:
            call.wrong = ""

    simulate(1, scenario)
