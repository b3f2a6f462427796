"""Cancelled requests stop computing and give everything back, in whatever phase they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from cluster import GREEDY, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.wire.orders import Cancel, Fence
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import PrefillRequest, Rejected, Work
from kvferry.worker.report import load
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.worker import PrefillWorker

LONG = Sampling(temperature=0.0, max_tokens=400)
State = Callable[[PrefillWorker, DecodeWorker, Work], bool]


def on_p(state: str) -> State:
    return lambda p, d, work: work.key in p.scheduler.sequences and p.scheduler.sequences[work.key].state == state


def on_d(state: str) -> State:
    return lambda p, d, work: work.key in d.scheduler.sequences and d.scheduler.sequences[work.key].state == state


def receiving(p: PrefillWorker, d: DecodeWorker, work: Work) -> bool:
    return on_d("fetching")(p, d, work) and d.metrics.value("kvferry_kv_bytes_total", direction="received") > 0


@pytest.mark.parametrize(
    ("phase", "reached"),
    [
        ("computing", on_p("computing")),
        ("held for pull", on_p("held")),
        ("opening", on_d("opening")),
        ("fetching", on_d("fetching")),
        ("receiving", receiving),
        ("running", on_d("running")),
    ],
)
def test_a_cancel_frees_everything_at_once_and_compute_stops_within_a_step(phase: str, reached: State) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill(max_num_batched_tokens=64)
        decode = await cluster.decode(reserve_lead=0.05)
        gateway = await cluster.gateway()
        if phase == "held for pull":  # D has no memory for it: another sequence runs there
            blocker = gateway.work(prompt_of(560, seed=5), sampling=LONG)
            await gateway.accepted(blocker, decode, prefill)
            await settled(lambda: on_d("running")(prefill, decode, blocker), within=2.0)
        work = gateway.work(prompt_of(500), sampling=LONG)
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: reached(prefill, decode, work), within=3.0)
        await gateway.cancel(work, prefill, decode)
        mine = {work.key}
        held = lambda w: mine & {h.holder for h in w.scheduler.memory.ledger}  # noqa: E731
        await settled(lambda: not held(prefill) and not held(decode), within=0.2)
        await settled(lambda: prefill.slots.num_free == decode.slots.num_free == 8, within=0.2)
        if phase == "held for pull":
            await gateway.cancel(blocker, prefill, decode)
        await settled(lambda: all_free(prefill, decode), within=0.2)
        steps = (load(prefill).steps, load(decode).steps)
        got = len(gateway.tokens.get(work.stream_id, {}))
        again = await gateway.run(prompt_of(20, seed=3), decode, prefill, sampling=GREEDY)
        assert gateway.text(again) == expected(prompt_of(20, seed=3), GREEDY, 8)
        assert (load(prefill).steps, load(decode).steps) == (steps[0] + 1, steps[1] + 7)
        assert len(gateway.tokens.get(work.stream_id, {})) <= got + 1
        assert work.stream_id not in gateway.ends
        assert prefill.metrics.value("kvferry_cancel_to_free_seconds_count") == prefill.metrics.value(
            "kvferry_cancel_total"
        )

    virtual(scenario)


def test_a_cancel_of_a_queued_request_takes_it_out_of_the_queue() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        first, queued = gateway.work(prompt_of(900), sampling=GREEDY), gateway.work(prompt_of(900, seed=2))
        await gateway.accepted(first, decode, prefill)
        await gateway.accepted(queued, decode, prefill)
        assert load(prefill).num_waiting == 1
        await gateway.cancel(queued, prefill, decode)
        await settled(lambda: load(prefill).num_waiting == 0, within=0.01)
        await gateway.ended(first)
        assert gateway.text(first) == expected(prompt_of(900), GREEDY, 8)
        assert queued.stream_id not in gateway.tokens

    virtual(scenario)


def test_a_request_that_comes_after_its_cancel_is_refused() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill = await cluster.prefill()
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(20))
        await gateway.tell(prefill, Cancel(work.ticket, work.attempt))
        answer = await gateway.ask(prefill, PrefillRequest(work))
        assert isinstance(answer, Rejected)
        assert answer.reason == "cancelled"
        assert load(prefill).steps == 0

    virtual(scenario)


def test_a_fence_drops_a_gateways_older_attempts_and_serves_on() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway, other = await cluster.gateway(), await cluster.gateway("gateway-1")
        old, theirs = gateway.work(prompt_of(60), sampling=LONG), other.work(prompt_of(60, seed=1), sampling=LONG)
        await gateway.accepted(old, decode, prefill)
        await other.accepted(theirs, decode, prefill)
        for worker in (prefill, decode):
            await gateway.tell(worker, Fence(worker.incarnation, gateway.incarnation, old.attempt))
        await settled(lambda: not {old.key} & set(decode.scheduler.sequences), within=0.1)
        stale = gateway.work(prompt_of(20), attempt=old.attempt)
        answers = await gateway.place(stale, decode, prefill)
        assert [a.reason for a in answers if isinstance(a, Rejected)] == ["stale_attempt"] * 2
        newer = await gateway.run(prompt_of(20), decode, prefill)
        assert gateway.text(newer) == expected(prompt_of(20), GREEDY, 8)
        await other.ended(theirs)
        assert other.text(theirs) == expected(prompt_of(60, seed=1), LONG, 400)

    virtual(scenario)


def test_a_newer_attempt_of_a_unit_cancels_the_older_one_and_goes_on_exactly() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        sampling = Sampling(temperature=0.0, max_tokens=60)
        old = gateway.work(prompt_of(60), sampling=sampling)
        await gateway.accepted(old, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(old.stream_id, {})) >= 20)
        new = gateway.again(old)
        before = gateway.text(old)
        await gateway.accepted(new, decode, prefill)
        assert set(decode.scheduler.sequences) == {new.key}
        stale = gateway.work(prompt_of(20), unit=new.unit, attempt=old.attempt)
        answer = await gateway.ask(prefill, PrefillRequest(stale))
        assert isinstance(answer, Rejected)
        assert answer.reason == "stale_attempt"
        await gateway.ended(new)
        assert before + gateway.text(new) == expected(prompt_of(60), sampling, 60)

    virtual(scenario)
