"""Gateways know which worker has which blocks, whatever the bus loses, and requests go where their prefix is."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from cluster import settled
from gateways import SimulatedGateway
from scripted_worker import VOCAB_SIZE
from workload import MODEL_NAME, ClientRequest, requests
from world import World, check_answered, informed, simulate

from kvferry.kv.events import pack_keys, unpack_keys
from kvferry.runtime import now
from kvferry.wire.cache_news import MAX_CACHE_KEYS, CacheEvents, CacheSnapshot
from kvferry.wire.messages import CacheNews
from kvferry.wire.sampling import Sampling
from kvferry.worker.worker import Worker
from kvferry_gateway.placement.prefix_index import Heard

ALWAYS_A_PAIR = {"gateway_local_prefill_threshold": 0}


def text(seed: int, count: int) -> tuple[int, ...]:
    chance = random.Random(seed)
    return tuple(chance.randrange(1, VOCAB_SIZE) for _ in range(count))


def asks(first: int, prompts: Sequence[tuple[int, ...]], apart: float) -> list[ClientRequest]:
    """One request after the other, `apart` seconds each."""
    greedy = Sampling(temperature=0.0, max_tokens=4, ignore_eos=True)
    return [ClientRequest(first + i, prompt, greedy, apart * (i + 1)) for i, prompt in enumerate(prompts)]


def knows(world: World) -> bool:
    return all(informed(core, worker) for core in world.cores for worker in world.workers)


def prefills(core: SimulatedGateway) -> list[str | None]:
    """Who prefilled, the latest first."""
    return [placing["prefill"] for placing in core.fleet.placers[MODEL_NAME].report(now())["latest"]]


def cached(worker: Worker[object]) -> int:
    return len(worker.scheduler.memory.pool.findable())


def test_requests_with_a_shared_prefix_go_where_it_is_cached() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=3, decode=1, gateways=2, **ALWAYS_A_PAIR)
        families = [text(seed, 320) for seed in range(3)]
        prompts = [families[i % 3] + text(100 + i, 40) for i in range(24)]
        await world.offer(asks(0, prompts, apart=0.6))
        await world.all_over()
        check_answered(world.calls)
        home: dict[int, set[str | None]] = {}
        for core in world.cores:
            for placing in core.fleet.placers[MODEL_NAME].report(now())["latest"]:
                home.setdefault(int(placing["request_id"][1:]) % 3, set()).add(placing["prefill"])
        assert all(len(workers) == 1 for workers in home.values()), home
        hits = [call.usage["prompt_tokens_details"]["cached_tokens"] for call in world.calls if call.usage is not None]
        assert all(hit == 320 for hit in hits[3:]), "all but the first of each family"

    simulate(1, scenario)


def test_without_cache_news_they_are_spread_over_all() -> None:
    """Negative control: it is the news that keeps a family together."""

    async def scenario(world: World) -> None:
        await world.start(prefill=3, decode=1, **ALWAYS_A_PAIR)
        (core,) = world.cores
        hear = core.fleet.placers[MODEL_NAME].hear
        core.fleet.placers[MODEL_NAME].hear = lambda news: Heard.OLD  # type: ignore[method-assign]
        await world.offer(asks(0, [text(0, 320) + text(100 + i, 40) for i in range(12)], apart=0.6))
        await world.all_over()
        assert len(set(prefills(core))) > 1
        core.fleet.placers[MODEL_NAME].hear = hear  # type: ignore[method-assign]

    simulate(1, scenario)


@pytest.mark.parametrize("share", [1, 2, 3])
def test_batches_that_were_lost_on_the_way_are_noticed_by_their_numbers_and_made_good(share: int) -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1, gateways=2, **ALWAYS_A_PAIR)
        placer = world.cores[0].fleet.placers[MODEL_NAME]
        hear, batches, snapshots = placer.hear, list[CacheNews](), list[CacheNews]()

        def lossy(news: CacheNews) -> Heard:
            (batches if isinstance(news, CacheEvents) else snapshots).append(news)
            return Heard.OLD if isinstance(news, CacheEvents) and len(batches) % share == 0 else hear(news)

        placer.hear = lossy  # type: ignore[method-assign]
        await world.offer(asks(0, [text(i, 100) for i in range(4)], apart=0.5))
        await world.all_over()
        await settled(lambda: knows(world), within=2.0)
        assert snapshots
        assert all(cached(worker) == 4 * 6 for worker in world.workers)

    simulate(1, scenario)


def test_a_gateway_that_comes_later_learns_what_is_there() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1, **ALWAYS_A_PAIR)
        await world.offer(asks(0, [text(0, 320)], apart=0.1))
        await world.all_over()
        late = await world.core("gateway-9")
        await settled(lambda: len(late.fleet.registry) == 2 and knows(world), within=1.5)

    simulate(1, scenario)


def test_a_restarted_worker_s_cache_is_forgotten_and_its_new_one_is_learned() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1, **ALWAYS_A_PAIR)
        (core,) = world.cores
        await world.offer(asks(0, [text(0, 320)], apart=0.1))
        await world.all_over()
        await settled(lambda: knows(world), within=1.0)
        before = world.workers[0]
        await world.kill(before)
        await world.prefill("prefill-0")
        snapshot = core.fleet.placers[MODEL_NAME].snapshot
        index, roster = snapshot.index, snapshot.roster
        await settled(lambda: before.incarnation not in roster and len(roster) == 2, within=2.0)
        assert index.num_blocks(before.incarnation) == 0
        await world.offer(asks(1, [text(0, 320)], apart=0.1))
        await world.all_over()
        check_answered(world.calls)
        await settled(lambda: knows(world), within=1.0)

    simulate(1, scenario)


def test_after_a_bus_outage_in_which_caches_changed_all_gateways_know_them() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=2, decode=2, gateways=2)
        await world.offer(requests(3, 30, seconds=1.0))
        world.broker.stop()
        for worker in world.workers:
            worker.scheduler.memory.pool.drop_cache()
        await settled(lambda: all(worker.cache_news.seq > 1 for worker in world.workers), within=2.0)
        world.broker.restart()
        await world.all_over()
        check_answered(world.calls)
        await settled(lambda: knows(world), within=3.0)

    simulate(3, scenario)


def test_many_gateways_that_ask_at_once_get_one_snapshot_in_parts() -> None:
    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1, gateways=3, **ALWAYS_A_PAIR)
        worker, parts, asked = world.workers[0], list[CacheSnapshot](), 0
        many = [number.to_bytes(16, "big") for number in range(1, MAX_CACHE_KEYS + 100)]
        worker.scheduler.memory.pool.findable = lambda: many  # type: ignore[method-assign]
        for core in world.cores:
            fleet = core.fleet
            hear = fleet.placers[MODEL_NAME].hear

            def listen(news: CacheNews, hear: object = hear, first: bool = core is world.cores[0]) -> Heard:
                if first and isinstance(news, CacheSnapshot):
                    parts.append(news)
                return hear(news)  # type: ignore[operator]

            fleet.placers[MODEL_NAME].hear = listen  # type: ignore[method-assign]
            record = fleet.registry.record_of(worker.incarnation)
            assert record is not None
            fleet.mail.resync(record)
            asked += 1
        await settled(lambda: len(parts) == 2, within=1.0)
        await settled(lambda: worker.cache_news._snapshot is not None and worker.cache_news._snapshot.done(), 1.0)
        assert (asked, [part.num_parts for part in parts]) == (3, [2, 2])
        keys = b"".join(part.keys for part in parts)
        assert sorted(unpack_keys(pack_keys(many)).tolist()) == unpack_keys(keys).tolist()
        del worker.scheduler.memory.pool.findable

    simulate(1, scenario)


def test_the_world_s_end_notices_a_gateway_that_missed_something() -> None:
    """Negative control of `World.stop`: this gateway neither takes batches nor looks at their numbers."""

    async def scenario(world: World) -> None:
        await world.start(prefill=1, decode=1, **ALWAYS_A_PAIR)
        fleet = world.cores[0].fleet
        hear = fleet.placers[MODEL_NAME].hear
        fleet.placers[MODEL_NAME].hear = lambda news: Heard.OLD if isinstance(news, CacheEvents) else hear(news)  # type: ignore[method-assign]
        fleet.placers[MODEL_NAME].heartbeat = lambda beat, moment: False  # type: ignore[method-assign]
        await world.offer(asks(0, [text(0, 100)], apart=0.1))
        await world.all_over()

    with pytest.raises(AssertionError, match="not within"):
        simulate(1, scenario)
