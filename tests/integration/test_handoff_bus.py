"""What the bus loses, doubles, reorders or should never have carried."""

from __future__ import annotations

import pytest
from cluster import GREEDY, Cluster, expected, prompt_of, settled, virtual

from kvferry.bus.memory import Faults
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.fields import pack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Cancel, Drain, EndAck, Fence, Ping, Pong
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.subjects import beat_subject, mail_subject
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected
from kvferry.worker.report import load

LONG = Sampling(temperature=0.0, max_tokens=300)


@pytest.mark.parametrize("seed", range(4))
def test_doubled_late_and_reordered_messages_still_give_exact_tokens(seed: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        for _ in range(seed):
            cluster.runtime.uniform()
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        cluster.broker.faults = Faults(duplication=0.3, reordering=0.3, min_delay=0.001, max_delay=0.02)
        sampling = Sampling(temperature=0.0, max_tokens=40)
        prompts = [prompt_of(30 + 40 * n, seed=n) for n in range(5)]
        works = [gateway.work(prompt, sampling=sampling) for prompt in prompts]
        for work in works:
            await gateway.accepted(work, decode, prefill)
        for work, prompt in zip(works, prompts, strict=True):
            await gateway.ended(work)
            await gateway.until(lambda work=work: len(gateway.tokens[work.stream_id]) == 40)
            assert gateway.text(work) == expected(prompt, sampling, 40)
        assert cluster.broker.counters.duplicated > 0
        assert cluster.broker.counters.reordered > 0
        assert decode.metrics.value("kvferry_cancel_total") == 0
        cluster.broker.faults = Faults()
        await settled(lambda: len(decode.outbox) + len(prefill.outbox) == 0, within=2.0)

    virtual(scenario)


def test_a_lost_batch_leaves_a_gap_that_a_resend_repairs() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        sampling = Sampling(temperature=0.0, max_tokens=40)
        work = gateway.work(prompt_of(60), sampling=sampling)
        await gateway.accepted(work, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(work.stream_id, {})) >= 5)
        gateway.lose = 3
        await gateway.ended(work)
        await gateway.until(lambda: len(gateway.tokens[work.stream_id]) == 40)
        assert gateway.lose == 0
        assert gateway.text(work) == expected(prompt_of(60), sampling, 40)

    virtual(scenario)


def test_an_end_is_repeated_until_the_gateway_confirms_it() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        gateway.acks = False
        work = gateway.work(prompt_of(60))
        await gateway.accepted(work, decode, prefill)
        await gateway.until(lambda: gateway.num_ends >= 4, limit=4.0)
        assert len(decode.outbox) == 1
        assert decode.scheduler.memory.pool.num_free == 64, "an unconfirmed end holds no memory"
        gateway.acks = True
        await settled(lambda: len(decode.outbox) == 0, within=1.0)
        heard = gateway.num_ends
        await gateway.run(prompt_of(30), decode, prefill)
        assert gateway.num_ends == heard + 1

    virtual(scenario)


def test_a_repeated_request_gets_the_first_answer_and_changes_nothing_also_after_the_end() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        gateway.acks = False
        work = gateway.work(prompt_of(60))
        for _ in range(3):
            await gateway.accepted(work, decode, prefill)
        await gateway.ended(work)
        await gateway.accepted(work, decode, prefill)
        assert gateway.text(work) == expected(prompt_of(60), GREEDY, 8)
        assert load(decode).steps == 7
        assert len(decode.outbox) == 1, "the repeat did not cost the end that waits for its confirmation"
        gateway.acks = True
        await settled(lambda: len(decode.outbox) == 0, within=1.0)

    virtual(scenario)


def test_an_operator_may_ping_and_drain_and_says_nothing_in_a_gateways_name() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        operator, codec = cluster.bus("drain", "operator"), Codecs().to_worker
        await operator.start()
        work = gateway.work(prompt_of(60), sampling=LONG)
        await gateway.accepted(work, decode, prefill)
        await gateway.until(lambda: len(gateway.tokens.get(work.stream_id, {})) >= 3)
        mail = mail_subject(decode.process, "operator")
        for message in (
            Cancel(work.ticket, work.attempt), Fence(decode.incarnation, gateway.incarnation, 1 << 20),
            EndAck(gateway.incarnation, (work.stream_id,)), DecodeRequest(work, None),
        ):  # fmt: skip
            await operator.publish(mail, codec.encode(message))
        beat = GatewayHeartbeat(1 << 20, "gateway-0", gateway.incarnation, gateway.subject, 1)  # wants no stream
        for _ in range(3):
            await operator.publish(beat_subject("dev", "gateway", "another", 1), Codecs().beat.encode(beat))
        pong = Codecs().answer.decode(await operator.request(mail, codec.encode(Ping(7)), 0.3))
        assert pong == Pong(7, decode.incarnation)
        assert decode.metrics.value("kvferry_wire_error_total", plane="bus", kind="impostor") == 7
        assert work.key in decode.scheduler.sequences
        await operator.publish(mail, codec.encode(Drain(decode.incarnation)))
        await decode.draining.wait()
        await gateway.cancel(work, decode, prefill)
        await operator.close()

    virtual(scenario)


@pytest.mark.parametrize("payload", [b"", b"\x01", b"garbage", b"\x02" + bytes(20), b"\x01" + b"\xc1" * 100])
def test_what_is_no_message_is_dropped_and_counted_and_disturbs_nothing(payload: bytes) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        for worker in (prefill, decode):
            await gateway._bus.publish(worker.subject, payload)
            await gateway._bus.publish("kvferry.dev.beat.gateway.x.0000000000000001", payload)
        work = await gateway.run(prompt_of(60), decode, prefill)
        assert gateway.text(work) == expected(prompt_of(60), GREEDY, 8)
        kind = "unknown_version" if payload and payload[0] != 1 else "malformed"
        for worker in (prefill, decode):
            assert worker.metrics.value("kvferry_wire_error_total", plane="bus", kind=kind) == 3
            assert worker.bus.counters.handler_errors == 0

    virtual(scenario)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"prompt": b"\0" * 7}, "malformed"),
        ({"prompt": b""}, "malformed"),
        ({"prompt": pack_tokens([256])}, "malformed"),
        ({"generated": pack_tokens([1, 999])}, "malformed"),
        ({"generated": pack_tokens([1] * 8)}, "malformed"),
        ({"prompt": pack_tokens([1] * 1024)}, "too_long"),
        ({"prompt": pack_tokens([1] * 1023), "generated": b"\1\0\0\0"}, "too_long"),
        ({"model": "other"}, "wrong_model"),
    ],
)
def test_work_that_cannot_be_done_is_rejected_with_its_reason(fields: dict[str, object], reason: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        made = dict(fields)
        work = gateway.work(prompt_of(20))
        work = type(work)(**{**{name: getattr(work, name) for name in work.__struct_fields__}, **made})
        answers = await gateway.place(work, decode, prefill)
        assert [a.reason for a in answers if isinstance(a, Rejected)] == [reason, reason]
        assert load(prefill).steps == load(decode).steps == 0

    virtual(scenario)


def test_a_request_for_the_other_role_or_with_no_single_shard_is_malformed() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(), await cluster.decode()
        gateway = await cluster.gateway()
        shardless = DecodeRequest(gateway.work(prompt_of(20)), WorkerAddress(1, ()))
        for worker, request in (
            (decode, PrefillRequest(gateway.work(prompt_of(20)))),
            (prefill, DecodeRequest(gateway.work(prompt_of(20)))),
            (decode, shardless),
        ):
            answer = await gateway.ask(worker, request)
            assert isinstance(answer, Rejected)
            assert answer.reason == "malformed"

    virtual(scenario)


def test_a_full_queue_makes_room_for_a_higher_priority_and_tells_who_lost_its_place() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(max_waiting=1), await cluster.decode(max_waiting=1)
        gateway = await cluster.gateway()
        first, displaced, urgent = (gateway.work(prompt_of(900, seed=n), priority=5 - n) for n in range(3))
        for work in (first, displaced):
            gateway.expect(work, prefill)
            assert isinstance(await gateway.ask(prefill, PrefillRequest(work)), Accepted)
        await gateway.accepted(urgent, decode, prefill)
        await gateway.until(lambda: displaced.stream_id in gateway.ends)
        assert gateway.ends[displaced.stream_id].reason == "preempted"
        await gateway.ended(urgent)
        assert urgent.stream_id in gateway.ends
        await gateway.cancel(first, prefill)
        await settled(lambda: not prefill.scheduler.sequences, within=0.5)

    virtual(scenario)


def test_a_full_queue_refuses_at_once_with_a_time_to_come_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await cluster.prefill(max_waiting=1), await cluster.decode()
        gateway = await cluster.gateway()
        works = [gateway.work(prompt_of(900, seed=n)) for n in range(3)]
        answers = []
        for work in works:
            gateway.expect(work, prefill)
            answers.append(await gateway.ask(prefill, PrefillRequest(work)))
        assert [type(answer) for answer in answers] == [Accepted, Accepted, Rejected]
        assert answers[2].reason == "queue_full"
        assert answers[2].retry_after >= 1.0
        for work in works:
            await gateway.cancel(work, prefill)
        await settled(lambda: not prefill.scheduler.sequences, within=0.1)
        pong = await gateway.ask(decode, Ping(77))
        assert pong == Pong(77, decode.incarnation)

    virtual(scenario)
