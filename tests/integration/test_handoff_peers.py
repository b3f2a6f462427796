"""Workers and gateways that die, freeze, leave or fall silent while others depend on them."""

from __future__ import annotations

import pytest
from cluster import GREEDY, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.schedule.step import BlockTable, StepResult
from kvferry.wire.frame import Piece
from kvferry.wire.orders import Drain
from kvferry.wire.sampling import Sampling
from kvferry_decode.scheduler import DecodeDecision

LONG = Sampling(temperature=0.0, max_tokens=300)


@pytest.mark.parametrize("phase", ["waiting", "computing", "sending"])
def test_when_p_is_killed_d_says_so_and_everything_is_free_and_another_pair_goes_on(phase: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=64)
        spare = await cluster.prefill("prefill-1")
        decode = await cluster.decode()
        gateway = await cluster.gateway()
        if phase == "waiting":
            blocker = gateway.work(prompt_of(900, seed=8))
            await gateway.accepted(blocker, decode, prefill)
        work = gateway.work(prompt_of(500))
        await gateway.accepted(work, decode, prefill)
        sent = "kvferry_kv_bytes_total"
        await settled(
            lambda: (
                prefill.scheduler.sequences[work.key].state == ("waiting" if phase == "waiting" else "computing")
                and (phase != "sending" or decode.metrics.value(sent, direction="received") > 0)
            ),
            within=1.0,
        )
        await cluster.kill(prefill)
        assert (await gateway.ended(work, limit=1.0)).reason == "prefill_lost"
        await settled(lambda: all_free(decode), within=1.0)
        again = gateway.again(work) if work.stream_id in gateway.tokens else gateway.work(prompt_of(500))
        await gateway.accepted(again, decode, spare)
        await gateway.ended(again)
        assert gateway.text(again) == expected(prompt_of(500), GREEDY, 8)

    virtual(scenario)


def test_when_d_is_killed_while_it_fetches_ps_kv_goes_back_to_its_lease_and_expires() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=64, lease_s=3.0)
        decode = await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(500))
        await gateway.accepted(work, decode, prefill)
        received = "kvferry_kv_bytes_total"
        await settled(lambda: decode.metrics.value(received, direction="received") > 0, within=1.0)
        await cluster.kill(decode)
        end = await gateway.ended(work, limit=5.0)
        assert end.reason == "expired"
        assert gateway.text(work) == expected(prompt_of(500), GREEDY, 1), "token 0 stays valid"
        await settled(lambda: all_free(prefill), within=0.1)
        assert prefill.metrics.value("kvferry_lease_expiry_total") == 1

    virtual(scenario)


@pytest.mark.parametrize("when", ["opening", "fetching"])
def test_a_frozen_p_is_a_stall_that_ends_the_connection_and_then_the_attempt(when: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=32)
        decode = await cluster.decode(pull_stall=0.6, reserve_lead=0.0 if when == "opening" else 1.0)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(800), sampling=GREEDY)
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: decode.scheduler.sequences[work.key].state == when, within=1.0)
        cluster.network.freeze("prefill-0")
        end = await gateway.ended(work, limit=8.0)
        assert end.reason == "prefill_lost"
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="stall") == 1
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="connect") == 1
        assert all_free(decode)
        cluster.network.thaw("prefill-0")
        await gateway.cancel(work, prefill, decode)
        await settled(lambda: all_free(prefill), within=1.0)

    virtual(scenario)


def test_a_p_that_answers_but_sends_no_frame_is_a_stall_too() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode(pull_stall=0.6)
        gateway = await cluster.gateway()
        prefill._sender._pump.run = _never  # type: ignore[method-assign]
        work = gateway.work(prompt_of(100))
        await gateway.accepted(work, decode, prefill)
        end = await gateway.ended(work, limit=5.0)
        assert end.reason == "prefill_lost"
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="stall") == 2
        await gateway.cancel(work, prefill, decode)

    async def _never(*_: object) -> None:
        return

    virtual(scenario)


def test_a_frozen_d_cannot_keep_ps_slots() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=64)
        frozen, decode = await cluster.decode(), await cluster.decode("decode-1")
        gateway = await cluster.gateway()
        cluster.network.delay = lambda: 0.002
        stuck = [gateway.work(prompt_of(300, seed=n)) for n in range(2)]
        for work in stuck:
            await gateway.accepted(work, frozen, prefill)
        await settled(lambda: prefill.slots.num_free < 8, within=1.0)
        cluster.network.freeze("decode-0")
        await settled(lambda: prefill.metrics.value("kvferry_transfer_failure_total", kind="send_stall") == 1, 7.0)
        work = await gateway.run(prompt_of(100, seed=9), decode, prefill)
        assert gateway.text(work) == expected(prompt_of(100, seed=9), GREEDY, 8)
        cluster.network.thaw("decode-0")
        for work in stuck:
            await gateway.cancel(work, prefill, frozen)
        await settled(lambda: all_free(prefill, frozen), within=1.0)

    virtual(scenario)


def test_held_kv_that_d_has_no_room_for_stays_alive_while_its_open_lives() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(lease_s=0.5), await cluster.decode(max_num_seqs=1)
        gateway = await cluster.gateway()
        first, second = gateway.work(prompt_of(60), sampling=LONG), gateway.work(prompt_of(60, seed=1))
        await gateway.accepted(first, decode, prefill)
        await gateway.accepted(second, decode, prefill)
        await gateway.ended(second)
        assert gateway.text(second) == expected(prompt_of(60, seed=1), GREEDY, 8)
        assert gateway.text(first) == expected(prompt_of(60), LONG, 300)
        assert prefill.metrics.value("kvferry_lease_expiry_total") == 0

    virtual(scenario)


def test_a_lease_that_runs_out_is_heard_from_p_by_both() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(lease_s=0.5), await cluster.decode(max_num_seqs=1)
        gateway = await cluster.gateway()
        first, second = gateway.work(prompt_of(60), sampling=LONG), gateway.work(prompt_of(60, seed=1))
        await gateway.accepted(first, decode, prefill)
        prefill.scheduler.has_open = lambda key: False
        await gateway.accepted(second, decode, prefill)
        end = await gateway.ended(second)
        assert end.reason == "expired"
        await settled(lambda: second.key not in decode.scheduler.sequences, within=0.1)
        assert decode.metrics.value("kvferry_pull_total", outcome="aborted_expired") == 1
        await gateway.ended(first)

    virtual(scenario)


@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_a_draining_worker_hands_over_within_its_grace_and_the_stream_goes_on_elsewhere(which: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(drain_grace=1.0), await cluster.decode(drain_grace=1.0)
        spare_p, spare_d = await cluster.prefill("prefill-1"), await cluster.decode("decode-1")
        gateway = await cluster.gateway()
        running = gateway.work(prompt_of(60), sampling=LONG)
        await gateway.accepted(running, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(running.stream_id, {})) >= 5)
        queued = [gateway.work(prompt_of(600, seed=n)) for n in (1, 2)]
        for work in queued:
            await gateway.accepted(work, decode, prefill)
        worker = prefill if which == "prefill" else decode
        await gateway.tell(worker, Drain(worker.incarnation))
        await worker.draining.wait()
        seconds = await cluster.drain(worker)
        assert seconds <= 1.0 + 0.26, "the grace, and the heartbeat that looks at it"
        pair = (decode, spare_p) if which == "prefill" else (spare_d, prefill)
        end = await gateway.ended(queued[1])
        assert end.reason == "draining"
        again = gateway.again(queued[1])
        first = gateway.text(queued[1])
        await gateway.accepted(again, *pair)
        await gateway.ended(again)
        assert first + gateway.text(again) == expected(prompt_of(600, seed=2), GREEDY, 8)
        if which == "decode":
            assert (await gateway.ended(running)).reason == "draining"
            resumed = gateway.again(running)
            before = gateway.text(running)
            await gateway.accepted(resumed, *pair)
            await gateway.ended(resumed)
            assert before + gateway.text(resumed) == expected(prompt_of(60), LONG, 300)
        for work in (running, queued[0]):
            await gateway.cancel(work, prefill, decode)

    virtual(scenario)


def test_the_work_of_a_silent_gateway_is_freed_and_anothers_goes_on() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        silent, other = await cluster.gateway(), await cluster.gateway("gateway-1")
        lost, kept = (
            silent.work(prompt_of(60), sampling=Sampling(temperature=0.0, max_tokens=900)),
            other.work(prompt_of(60, seed=1), sampling=LONG),
        )
        await silent.accepted(lost, decode, prefill)
        await other.accepted(kept, decode, prefill)
        await silent.until(lambda: len(silent.tokens.get(lost.stream_id, {})) >= 5)
        silent.beating = False
        waited = await settled(lambda: lost.key not in decode.scheduler.sequences, within=2.0)
        assert waited > 0.9
        await other.ended(kept)
        assert other.text(kept) == expected(prompt_of(60, seed=1), LONG, 300)
        assert len(decode.outbox) <= 1
        silent.beating = True

    virtual(scenario)


def test_a_stream_missing_from_two_heartbeats_is_cancelled() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(60), sampling=LONG)
        await gateway.accepted(work, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(work.stream_id, {})) >= 5)
        gateway.forget(work)
        waited = await settled(lambda: all_free(prefill, decode), within=0.8)
        assert waited > 0.2, "one heartbeat is not enough"
        assert decode.metrics.value("kvferry_cancel_total") == 1

    virtual(scenario)


def test_a_bus_that_stays_away_ends_what_runs_after_its_grace_and_a_short_outage_ends_nothing() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(bus_grace=4.0), await cluster.decode(bus_grace=4.0)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(60), sampling=Sampling(temperature=0.0, max_tokens=900))
        await gateway.accepted(work, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(work.stream_id, {})) >= 5)
        cluster.broker.stop()
        waited = await settled(lambda: not decode.scheduler.sequences, within=5.0)
        assert waited >= 3.9
        cluster.broker.restart()
        await settled(lambda: decode.bus.connected and prefill.bus.connected, within=1.5)

    virtual(scenario)


@pytest.mark.parametrize("which", ["prefill", "decode"])
def test_an_engine_step_that_fails_costs_its_own_sequences_and_the_worker_serves_on(which: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        runner = prefill.runner if which == "prefill" else decode.runner
        execute = runner.execute

        def fail(_: object) -> StepResult:
            runner.execute = execute  # type: ignore[method-assign]
            raise RuntimeError("planted")

        runner.execute = fail  # type: ignore[method-assign]
        work = gateway.work(prompt_of(60))
        await gateway.accepted(work, decode, prefill)
        end = await gateway.ended(work, limit=1.0)
        assert (end.reason, end.detail) == ("error", "RuntimeError")
        await gateway.cancel(work, prefill, decode)
        await settled(lambda: all_free(prefill, decode), within=0.2)
        good = await gateway.run(prompt_of(60, seed=1), decode, prefill)
        assert gateway.text(good) == expected(prompt_of(60, seed=1), GREEDY, 8)

    virtual(scenario)


@pytest.mark.parametrize("which", ["gather", "scatter"])
@pytest.mark.parametrize("times", [1, 100])
def test_a_copy_that_fails_costs_a_try_of_the_pull_and_no_slot(which: str, times: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        runner = prefill.runner if which == "gather" else decode.runner
        copy, left = getattr(runner, which), times

        def fail(piece: Piece, block_table: BlockTable, view: memoryview) -> None:
            nonlocal left
            left -= 1
            if left >= 0:
                raise RuntimeError("planted")
            copy(piece, block_table, view)

        setattr(runner, which, fail)
        prefill.digests.enabled = decode.digests.enabled = False
        work = gateway.work(prompt_of(60))
        await gateway.accepted(work, decode, prefill)
        end = await gateway.ended(work, limit=2.0)
        assert end.reason == ("length" if times == 1 else "prefill_lost" if which == "gather" else "transfer_failed")
        if times == 1:
            assert gateway.text(work) == expected(prompt_of(60), GREEDY, 8)
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="scatter") == (
            0 if which == "gather" else min(times, 2)
        )
        await gateway.cancel(work, prefill, decode)
        await settled(lambda: all_free(prefill, decode), within=0.2)

    virtual(scenario)


def test_what_a_decision_drops_makes_the_engine_look_again() -> None:
    async def scenario(cluster: Cluster) -> None:
        decode = await cluster.decode()
        gateway = await cluster.gateway()
        looks: list[bool] = []
        decide = decode.decide

        def counting(moment: float) -> DecodeDecision:
            decision = decide(moment)
            looks.append(bool(decision.dropped))
            return decision

        decode.decide = counting  # type: ignore[method-assign]
        work = gateway.work(prompt_of(60), deadline=0.0)
        await gateway.accepted(work, decode, None)
        assert (await gateway.ended(work)).reason == "deadline"
        assert looks[looks.index(True) + 1 :], "memory that it gave up may be another's"

    virtual(scenario)
