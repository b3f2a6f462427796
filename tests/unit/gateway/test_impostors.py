"""A worker that speaks for another one: the bus holds it to its role's subjects, the gateway to what they show."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from msgspec.structs import replace
from scripted_worker import CLUSTER, EOS, MODEL, PATIENCE_S, Cluster, ScriptedWorker, completion, tokens_of

from kvferry.wire.beats import Heartbeat
from kvferry.wire.cache_news import CacheEvents
from kvferry.wire.fields import pack_tokens
from kvferry.wire.messages import Codecs
from kvferry.wire.subjects import beat_subject, cache_subject, mail_subject, process_subject
from kvferry.wire.tokens import TokenBatch
from kvferry.wire.work import DecodeRequest, Work

pytestmark = pytest.mark.usefixtures("no_leaks")
TEXT = "what was asked for"
FORGED = tokens_of("forged")


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with Cluster(tmp_path) as made:
        yield made


async def counted(cluster: Cluster, number: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while cluster.metrics.value("kvferry_wire_error_total", plane="bus", kind="impostor") < number:
            await asyncio.sleep(0.005)


def beat_of(worker: ScriptedWorker, **record: object) -> bytes:
    """The next heartbeat but a thousand of a worker, which says that it is about to end."""
    return Codecs().beat.encode(Heartbeat(1 << 20, "wedged", replace(worker.record, **record), worker.load))


def as_another(forger: ScriptedWorker, victim: ScriptedWorker) -> bytes:
    return beat_of(victim)


def as_one_of_its_own_role(forger: ScriptedWorker, victim: ScriptedWorker) -> bytes:
    process = process_subject(CLUSTER, forger.role, forger.record.name, victim.incarnation)
    return beat_of(victim, role=forger.role, name=forger.record.name, subject=mail_subject(process, "gateway"))


def with_anothers_mailbox(forger: ScriptedWorker, victim: ScriptedWorker) -> bytes:
    return beat_of(forger, subject=victim.record.subject)


@pytest.mark.parametrize("forge", [as_another, as_one_of_its_own_role, with_anothers_mailbox])
async def test_a_heartbeat_for_another_process_is_dropped_and_counted(
    cluster: Cluster, forge: Callable[[ScriptedWorker, ScriptedWorker], bytes]
) -> None:
    prefill, decode = await cluster.pair()
    payload = forge(prefill, decode)
    for incarnation in (prefill.incarnation, decode.incarnation):
        subject = beat_subject(CLUSTER, "prefill", "prefill-0", incarnation)  # what its rights allow
        await prefill.bus.publish(subject, payload)
    # One of the two may be its own; what is wrong with it is then what it says.
    await counted(cluster, 2)
    registry = cluster.gateway.fleet.registry
    assert [registry.state_of(worker.incarnation) for worker in (prefill, decode)] == ["ready", "ready"]
    assert registry.record_of(decode.incarnation) == decode.record
    assert registry.record_of(prefill.incarnation) == prefill.record


async def test_a_token_is_taken_only_from_a_worker_of_its_attempt_in_its_own_role(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    bystander = await cluster.worker("decode", "decode-1", running=50)

    def forge(work: Work) -> None:
        forged = (pack_tokens([work.stream_id] * len(FORGED)), pack_tokens(range(len(FORGED))), pack_tokens(FORGED))
        own, others = bystander.works, cluster.gateway.fleet
        assert not own
        for mailbox, incarnation in (
            (others.mail_from("prefill"), decode.incarnation),  # in D's name: an impostor
            (others.mail_from("decode"), prefill.incarnation),
            (others.mail_from("decode"), bystander.incarnation),  # in its own, of a stream that it does not serve
        ):
            decode.send(mailbox, Codecs().to_gateway.encode(TokenBatch(incarnation, 0, *forged)))

    def speak(work: Work) -> None:
        forge(work)
        decode.say(work, [*tokens_of(TEXT), EOS])

    decode.accepted = speak
    answer = await cluster.client.post("/v1/completions", json=completion())
    assert answer.json()["choices"][0]["text"] == TEXT
    await decode.wait_for(DecodeRequest)
    await counted(cluster, 2)
    assert cluster.metrics.value("kvferry_late_row_total") == len(FORGED)
    assert cluster.metrics.value("kvferry_token_mismatch_total") == 0


async def test_negative_control_the_same_tokens_from_its_own_worker_are_taken(cluster: Cluster) -> None:
    decode = await cluster.speaker(FORGED)
    answer = await cluster.client.post("/v1/completions", json=completion())
    assert answer.json()["choices"][0]["text"] == "forged"
    assert decode.works


async def test_news_of_anothers_cache_are_dropped_and_counted(cluster: Cluster) -> None:
    prefill, decode = await cluster.pair()
    news = Codecs().cache.encode(CacheEvents(decode.incarnation, 1, bytes(range(16))))
    await prefill.bus.publish(cache_subject(CLUSTER, "prefill", "prefill-0", decode.incarnation), news)
    await prefill.bus.publish(cache_subject(CLUSTER, "prefill", "prefill-0", prefill.incarnation), news)
    await counted(cluster, 2)
    assert len(cluster.gateway.fleet.placers[MODEL].snapshot.index) == 0
    await decode.bus.publish(cache_subject(CLUSTER, "decode", "decode-0", decode.incarnation), news)
    async with asyncio.timeout(PATIENCE_S):
        while len(cluster.gateway.fleet.placers[MODEL].snapshot.index) != 2:
            await asyncio.sleep(0.005)
