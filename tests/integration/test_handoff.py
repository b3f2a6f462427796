"""The hand-off between real workers in one process, on a virtual clock, with a model that wrong KV cannot fool."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
from cluster import GREEDY, MODEL, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.runtime import now
from kvferry.schedule.step import StepPlan, StepResult
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest
from kvferry.worker.report import address, held, load


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 200, 400])
def test_a_prompt_prefilled_elsewhere_gives_the_tokens_of_an_undisturbed_run(length: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(length))
        answers = await gateway.place(work, decode, prefill)
        assert all(isinstance(answer, Accepted) for answer in answers)
        end = await gateway.ended(work)
        assert end.reason == "length"
        assert gateway.text(work) == expected(prompt_of(length), GREEDY, 8)
        value = decode.metrics.value
        assert value("kvferry_pull_total", outcome="received") == 1
        assert value("kvferry_kv_token_total", direction="received") == length

    virtual(scenario)


def test_a_prompt_of_which_both_know_a_prefix_is_computed_and_fetched_only_in_part() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        first, second = prompt_of(100), prompt_of(100)[:70] + prompt_of(60, seed=9)
        await gateway.run(first, decode, prefill)
        work = await gateway.run(second, decode, prefill)
        assert gateway.text(work) == expected(second, GREEDY, 8)
        assert prefill.scheduler.memory.hit_tokens == 64
        received = decode.metrics.value("kvferry_kv_token_total", direction="received")
        assert received == 100 + (130 - 64), "from_token is the end of D's own prefix"
        assert gateway.cached[work.stream_id] == 64

    virtual(scenario)


def test_a_prompt_that_d_knows_as_a_whole_is_pulled_as_a_manifest_alone() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        prompt = prompt_of(96)
        for _ in range(2):
            work = await gateway.run(prompt, decode, prefill)
            assert gateway.text(work) == expected(prompt, GREEDY, 8)
        assert decode.metrics.value("kvferry_kv_token_total", direction="received") == 96
        assert decode.metrics.value("kvferry_pull_total", outcome="received") == 2

    virtual(scenario)


def test_kv_is_streamed_into_the_open_pull_while_the_prompt_is_still_computed() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=32)
        decode = await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(400))
        await gateway.accepted(work, decode, prefill)
        sent = "kvferry_kv_token_total"
        await settled(lambda: prefill.metrics.value(sent, direction="sent") >= 64, within=1.0)
        [computing] = prefill.scheduler.sequences.values()
        assert computing.state == "computing"
        assert computing.num_computed < 200
        await settled(lambda: computing.state == "held", within=1.0)
        ready = await settled(lambda: work.key not in prefill.scheduler.sequences, within=1.0)
        assert ready < 0.02, "only the last chunk is left to send"
        await gateway.ended(work)
        assert gateway.text(work) == expected(prompt_of(400), GREEDY, 8)

    virtual(scenario)


def test_heartbeats_tell_how_far_a_prompt_is_computed_and_its_kv_has_come() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=32)
        decode = await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(400))
        await gateway.accepted(work, decode, prefill)
        kv_bytes = 400 * decode.runner.kv_format.token_bytes
        computed, come = [0], [0]

        def watched() -> bool:
            for worker, state, total, seen in (
                (prefill, "computing", 400, computed), (decode, "fetching", kv_bytes, come),
            ):  # fmt: skip
                for row in held(worker).get(work.gateway, ()):
                    if row.state == state:
                        assert row.total == total
                        seen.append(row.done)
                    else:
                        assert (row.done, row.total) == (0, 0)
            return work.key not in prefill.scheduler.sequences

        await settled(watched, within=5.0)
        for seen, total in ((computed, 400), (come, kv_bytes)):
            assert seen == sorted(seen)
            assert len(set(seen)) > 5, "it is seen growing"
            assert seen[-1] <= total
        assert load(prefill).blocks["held"] == load(decode).blocks["fetching"] == 0
        assert load(decode).blocks["running"] == -(-401 // decode.runner.kv_format.block_size)
        assert sum(load(decode).blocks.values()) == decode.runner.num_blocks
        await gateway.ended(work)

    virtual(scenario)


def test_with_the_first_token_that_a_worker_draws_it_tells_where_the_time_went() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        began = now()
        pulled = await gateway.run(prompt_of(200), decode, prefill)
        local = await gateway.run(prompt_of(200, seed=5), decode, None)
        on_p = gateway.spent[prefill.incarnation, pulled.stream_id]
        on_d = gateway.spent[decode.incarnation, pulled.stream_id]
        alone = gateway.spent[decode.incarnation, local.stream_id]
        assert on_p.computing_s > 0.0
        assert (on_p.fetching_s, on_p.step_s) == (0.0, 0.0)
        assert on_d.computing_s == 0.0
        assert min(on_d.fetching_s, on_d.step_s) > 0.0
        assert on_d.waiting_s + on_d.fetching_s >= on_p.computing_s, "D runs when P has computed all"
        assert alone.computing_s > 0.0
        assert (alone.fetching_s, alone.step_s) == (0.0, 0.0)
        told = sum(sum((s.waiting_s, s.computing_s, s.fetching_s, s.step_s)) for s in (on_d, alone))
        assert told < now() - began

    virtual(scenario)


def test_a_prompt_without_a_prefill_worker_is_computed_on_d_beside_pulled_ones() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        prompts = [prompt_of(60 + 17 * n, seed=n) for n in range(6)]
        works = [gateway.work(prompt) for prompt in prompts]
        for n, work in enumerate(works):
            await gateway.accepted(work, decode, prefill if n % 2 else None)
        for work, prompt in zip(works, prompts, strict=True):
            assert (await gateway.ended(work)).reason == "length"
            assert gateway.text(work) == expected(prompt, GREEDY, 8)
        assert decode.metrics.value("kvferry_pull_total", outcome="received") == 3

    virtual(scenario)


def test_seeded_draws_do_not_depend_on_where_they_are_drawn() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        sampling = Sampling(temperature=0.8, seed=42, max_tokens=12)
        for helper in (prefill, None):
            work = await gateway.run(prompt_of(50), decode, helper, sampling=sampling)
            assert gateway.text(work) == expected(prompt_of(50), sampling, 12)
        assert expected(prompt_of(50), sampling, 12) != expected(prompt_of(50), GREEDY, 12)

    virtual(scenario)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_penalties_count_the_same_tokens_wherever_a_sequence_is_drawn(temperature: float) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        sampling = Sampling(temperature=temperature, seed=42, max_tokens=12, frequency_penalty=0.5)
        whole = expected(prompt_of(50), sampling, 12)
        for helper in (prefill, None):  # token 0 is drawn on P, then on D
            work = await gateway.run(prompt_of(50), decode, helper, sampling=sampling)
            assert gateway.text(work) == whole
            # As after a failure: what was generated so far is generated, not prompt.
            again = await gateway.run(prompt_of(50), decode, helper, sampling=sampling, generated=whole[:5])
            assert gateway.text(again) == whole[5:]
        assert whole != expected(prompt_of(50), msgspec.structs.replace(sampling, frequency_penalty=0.0), 12)
        longer = prompt_of(50) + whole[:5]
        assert expected(longer, sampling, 7) != whole[5:], "the twin tells prompt and generated tokens apart"

    virtual(scenario)


@pytest.mark.parametrize("late", [False, True])
def test_a_first_token_that_ends_the_sequence_frees_d_without_running(late: bool) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(40), sampling=Sampling(temperature=0.0, max_tokens=1))
        if late:  # D's Open arrives when P has ended and forgotten the sequence
            gateway.expect(work, prefill)
            assert isinstance(await gateway.ask(prefill, PrefillRequest(work)), Accepted)
            await gateway.ended(work)
            await gateway.ask(decode, DecodeRequest(work, address(prefill)))
        else:
            await gateway.accepted(work, decode, prefill)
        assert (await gateway.ended(work)).reason == "length"
        await settled(lambda: all_free(prefill, decode) and not decode.scheduler.sequences, within=0.1)
        assert load(decode).steps == 0
        assert gateway.text(work) == expected(prompt_of(40), GREEDY, 1)
        assert decode.metrics.value("kvferry_pull_total", outcome="aborted_ended") == 1
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="unknown_ticket") == 0

    virtual(scenario)


def test_an_eos_as_the_first_token_ends_with_stop() -> None:
    async def scenario(cluster: Cluster) -> None:
        token = expected(prompt_of(40), GREEDY, 1)[0]
        model = replace(MODEL, eos_token_ids=frozenset({token}))
        prefill, decode = await cluster.prefill(model=model), await cluster.decode(model=model)
        gateway = await cluster.gateway()
        work = await gateway.run(prompt_of(40), decode, prefill)
        assert gateway.ends[work.stream_id].reason == "stop"
        assert gateway.text(work) == [token]
        assert load(decode).steps == 0
        ignoring = Sampling(temperature=0.0, max_tokens=3, ignore_eos=True)
        work = await gateway.run(prompt_of(40), decode, prefill, sampling=ignoring)
        assert gateway.text(work) == expected(prompt_of(40), ignoring, 3, model)

    virtual(scenario)


def test_a_sequence_that_must_run_alone_runs_in_steps_of_its_own() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        long = Sampling(temperature=0.0, max_tokens=40)
        plans: list[set[int]] = []
        execute = decode.runner.execute

        def recording(plan: StepPlan) -> StepResult:
            plans.append({step.sequence_id for step in plan.steps})
            return execute(plan)

        decode.runner.execute = recording  # type: ignore[method-assign]
        works = [gateway.work(prompt_of(40, seed=n), alone=n == 1, sampling=long) for n in range(3)]
        for work in works:
            await gateway.accepted(work, decode, prefill)
        for n, work in enumerate(works):
            await gateway.ended(work)
            assert gateway.text(work) == expected(prompt_of(40, seed=n), long, 40)
        assert {2} in plans, "the one that must be alone"
        assert all(len(plan) == 1 for plan in plans if 2 in plan)
        assert any(len(plan) == 2 for plan in plans)

    virtual(scenario)
