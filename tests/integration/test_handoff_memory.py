"""Too little memory on either side: older requests first, nobody for ever, and no token lost."""

from __future__ import annotations

from dataclasses import replace

import pytest
from cluster import GREEDY, MODEL, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.wire.sampling import Sampling
from kvferry.worker.report import load

SMALL = replace(MODEL, num_blocks=20, max_model_len=320)


def test_an_older_request_takes_back_younger_held_kv_on_p() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(model=SMALL), await cluster.decode(max_num_seqs=1)
        gateway = await cluster.gateway()
        busy = gateway.work(prompt_of(60), sampling=Sampling(temperature=0.0, max_tokens=200))
        await gateway.accepted(busy, decode, prefill)
        await settled(lambda: load(decode).num_running == 1, within=1.0)
        younger = gateway.work(prompt_of(200, seed=1), arrival=50.0)
        older = gateway.work(prompt_of(200, seed=2), arrival=40.0)
        await gateway.accepted(younger, decode, prefill)
        await settled(lambda: prefill.scheduler.sequences[younger.key].state == "held", within=1.0)
        await gateway.accepted(older, decode, prefill)
        assert (await gateway.ended(younger)).reason == "preempted"
        assert decode.metrics.value("kvferry_pull_total", outcome="aborted_reclaimed") == 1
        again = gateway.again(younger)
        assert len(again.generated) == 4, "token 0 is kept, a recompute never samples it"
        await gateway.accepted(again, decode, prefill)
        await gateway.ended(older)
        await gateway.ended(again)
        assert gateway.text(older) == expected(prompt_of(200, seed=2), GREEDY, 8)
        assert gateway.text(younger) + gateway.text(again) == expected(prompt_of(200, seed=1), GREEDY, 8)
        assert prefill.metrics.value("kvferry_preemption_total") == 1

    virtual(scenario)


def test_growth_preempts_the_younger_which_goes_on_exactly_when_it_is_placed_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode(model=SMALL)
        gateway = await cluster.gateway()
        sampling = Sampling(temperature=0.7, seed=7, max_tokens=160)
        old = gateway.work(prompt_of(100), sampling=sampling)
        young = gateway.work(prompt_of(100, seed=1), sampling=sampling)
        await gateway.accepted(old, decode, prefill)
        await gateway.accepted(young, decode, prefill)
        assert (await gateway.ended(young)).reason == "preempted"
        got = gateway.text(young)
        assert 1 < len(got) < 160
        again = gateway.again(young)
        await gateway.accepted(again, decode, prefill)
        assert (await gateway.ended(again)).reason == "length"
        assert (await gateway.ended(old)).reason == "length"
        assert gateway.text(old) == expected(prompt_of(100), sampling, 160)
        assert got + gateway.text(again) == expected(prompt_of(100, seed=1), sampling, 160)
        assert decode.metrics.value("kvferry_preemption_total") == decode.scheduler.num_preempted == 1

    virtual(scenario)


@pytest.mark.parametrize("num_requests", [2, 7])
def test_prompts_of_sixty_percent_of_both_pools_all_finish(num_requests: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(model=SMALL), await cluster.decode(model=SMALL)
        gateway = await cluster.gateway()
        prompts = [prompt_of(192, seed=n) for n in range(num_requests)]
        works = [gateway.work(prompt) for prompt in prompts]
        for work in works:
            await gateway.accepted(work, decode, prefill)
        for work, prompt in zip(works, prompts, strict=True):
            assert (await gateway.ended(work)).reason == "length"
            assert gateway.text(work) == expected(prompt, GREEDY, 8)

    virtual(scenario)


def test_crossed_orders_on_two_prefill_workers_do_not_lock_d() -> None:
    async def scenario(cluster: Cluster) -> None:
        one, two = await cluster.prefill(model=SMALL), await cluster.prefill("prefill-1", model=SMALL)
        decode = await cluster.decode(model=SMALL)
        gateway = await cluster.gateway()
        works = [gateway.work(prompt_of(192, seed=n)) for n in range(6)]
        for n, work in enumerate(works):
            await gateway.accepted(work, decode, (one, two)[n % 2])
        ended = 0
        for n, work in enumerate(works):
            end = await gateway.ended(work)
            while end.reason in ("preempted", "expired"):
                work = gateway.again(work)
                await gateway.accepted(work, decode, (one, two)[n % 2])
                end = await gateway.ended(work)
            assert end.reason == "length"
            ended += 1
        assert ended == 6
        await settled(lambda: all_free(one, two, decode), within=0.2)

    virtual(scenario)


def test_a_request_that_no_memory_comes_free_for_ends_by_its_own_deadline() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode(model=SMALL)
        gateway = await cluster.gateway()
        busy = gateway.work(prompt_of(150), sampling=Sampling(temperature=0.0, max_tokens=160))
        late = gateway.work(prompt_of(250, seed=1), deadline=0.6)
        await gateway.accepted(busy, decode, prefill)
        await settled(lambda: load(decode).num_running == 1, within=1.0)
        await gateway.accepted(late, decode, prefill)
        assert (await gateway.ended(late, limit=1.0)).reason == "deadline"
        await gateway.cancel(late, prefill)
        await gateway.ended(busy)
        assert gateway.text(busy) == expected(prompt_of(150), busy.sampling, 160)

    virtual(scenario)
