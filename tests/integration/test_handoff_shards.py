"""Hand-offs between workers that have ranks on other hosts: each shard of D pulls its KV heads from the shards of P
that have them, and the sequence runs only if all parts are right."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest
from cluster import GREEDY, MODEL, Cluster, all_free, expected, prompt_of, settled, virtual

from kvferry.engine.memory.runner import MemorySettings
from kvferry.runtime import now
from kvferry.transport.base import Connection
from kvferry.wire.flow import Abort, Aborted, Ack, Credit, FetchPart, Flow, FlowCodec
from kvferry.wire.frame import HEADER_BYTES, frame_tag
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling
from kvferry.wire.work import DecodeRequest, Rejected
from kvferry.worker.debug import debug_app
from kvferry.worker.handoff.parts import parts_of
from kvferry.worker.handoff.plane import ShardPlane
from kvferry.worker.handoff.shards import COUNT_TIMEOUT_S
from kvferry.worker.report import address
from kvferry.worker.worker import Worker
from kvferry_decode.worker import DecodeWorker
from kvferry_prefill.worker import PrefillWorker

HEADS = replace(MODEL, num_kv_heads=3, num_heads=9)
LONG = Sampling(temperature=0.0, max_tokens=400)
# Ranks, and how many of them are on other hosts. Of 4 ranks two have the same KV head.
SHARDINGS = ((1, 0), (2, 1), (3, 1), (3, 2), (4, 2), (4, 3))
OPEN = (3, 2)  # three shards, a head each


def ranks(sharding: tuple[int, int]) -> dict[str, Any]:
    return {"tensor_parallel_size": sharding[0], "remote_ranks": sharding[1]}


async def pair(
    cluster: Cluster, of_p: tuple[int, int], of_d: tuple[int, int], model: MemorySettings = HEADS, **settings: Any
) -> tuple[PrefillWorker, DecodeWorker]:
    prefill = await cluster.prefill(model=model, **ranks(of_p), **settings)
    return prefill, await cluster.decode(model=model, **ranks(of_d), **settings)


def planes_free(cluster: Cluster) -> bool:
    """Whether no rank on another host holds anything."""
    planes = [plane for planes in cluster.planes.values() for plane in planes]
    return all(
        plane.slots.num_free == plane.slots.num_slots and len(plane.server) == len(plane.fetcher) == 0
        for plane in planes
    )


def heads_of(worker: Worker[Any]) -> list[range]:
    """Of each of its shards."""
    return [worker.runner.here.heads, *(shard.heads for shard in worker.shards)]


def moved(plane: ShardPlane, direction: str) -> float:
    return plane.metrics.value("kvferry_kv_bytes_total", direction=direction)


@pytest.mark.parametrize("of_p", SHARDINGS, ids=str)
@pytest.mark.parametrize("of_d", SHARDINGS, ids=str)
def test_any_two_shardings_hand_over_and_every_shard_moves_its_own_heads(
    of_p: tuple[int, int], of_d: tuple[int, int]
) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, of_p, of_d, max_num_batched_tokens=64)
        gateway = await cluster.gateway()
        prompts = [prompt_of(200, seed=seed) for seed in range(3)]
        works = [gateway.work(prompt) for prompt in prompts]
        for work in works:
            await gateway.accepted(work, decode, prefill)
        for work, prompt in zip(works, prompts, strict=True):
            await gateway.ended(work)
            assert gateway.text(work) == expected(prompt, GREEDY, 8, HEADS)
        assert decode.metrics.value("kvferry_pull_total", outcome="received") == 3
        head_bytes = HEADS.kv_format.token_bytes // HEADS.num_kv_heads * 200 * 3
        for plane in cluster.planes.get("decode-0", {}):
            assert moved(plane, "received") == head_bytes * len(plane.heads)
        wanted = sum(map(len, heads_of(decode)))
        received = decode.metrics.value("kvferry_kv_bytes_total", direction="received")
        sent = prefill.metrics.value("kvferry_kv_bytes_total", direction="sent")
        assert received == sent == head_bytes * wanted
        parts = parts_of(heads_of(decode), heads_of(prefill))
        assert parts is not None
        for shard, plane in enumerate(cluster.planes.get("prefill-0", {}), 1):
            asked = sum(len(part.heads) for part in parts if part.peer == shard)
            assert moved(plane, "sent") == head_bytes * asked
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)

    virtual(scenario)


def test_a_prefix_that_d_has_is_not_fetched_by_any_shard() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN)
        gateway = await cluster.gateway()
        await gateway.run(prompt_of(160), decode, prefill)
        before = [moved(plane, "received") for plane in cluster.planes["decode-0"]]
        longer = prompt_of(200)
        work = await gateway.run(longer, decode, prefill)
        assert gateway.text(work) == expected(longer, GREEDY, 8, HEADS)
        head_bytes = HEADS.kv_format.token_bytes // HEADS.num_kv_heads
        for plane, old in zip(cluster.planes["decode-0"], before, strict=True):
            assert moved(plane, "received") - old == head_bytes * 40

    virtual(scenario)


@pytest.mark.parametrize("place", range(6))
def test_a_bad_frame_of_a_part_is_asked_for_again_alone(place: int) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=64)
        gateway = await cluster.gateway()
        for _ in range(place):
            cluster.network.spoil_next_frame(lambda frame: None)
        cluster.network.spoil_next_frame(lambda frame: frame.__setitem__(-1, frame[-1] ^ 1))
        work = await gateway.run(prompt_of(320), decode, prefill)
        assert gateway.text(work) == expected(prompt_of(320), GREEDY, 8, HEADS)
        owners = [decode.metrics, *(plane.metrics for plane in cluster.planes["decode-0"])]
        assert sum(owner.value("kvferry_transfer_failure_total", kind="checksum") for owner in owners) == 1
        assert decode.metrics.value("kvferry_pull_total", outcome="received") == 1

    virtual(scenario)


def test_every_part_has_to_be_right() -> None:
    """The manifest of one part that names another prompt spoils the pull; the second try is right."""

    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN)
        gateway = await cluster.gateway()
        told = prefill.shards[1].tell
        wrong = True

        def lie(order: Any) -> None:
            nonlocal wrong
            if wrong and type(order).__name__ == "Finish":
                wrong = False
                order = type(order)(order.part, _with_other_hash(order.manifest))
            told(order)

        prefill.shards[1].tell = lie  # type: ignore[method-assign]
        work = await gateway.run(prompt_of(100), decode, prefill)
        assert not wrong
        assert gateway.text(work) == expected(prompt_of(100), GREEDY, 8, HEADS)
        value = decode.metrics.value
        assert value("kvferry_transfer_failure_total", kind="chain_hash") == 1
        assert value("kvferry_pull_total", outcome="received") == 1
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)

    virtual(scenario)


def _with_other_hash(manifest: Any) -> Any:
    return type(manifest)(
        manifest.num_frames, manifest.kv_format_id, manifest.hash_from, bytes(16), manifest.first_tokens
    )


@pytest.mark.parametrize("ends", [("decode-0", "prefill-0-rank-1"), ("decode-0-rank-1", "prefill-0-rank-1")], ids=str)
def test_a_connection_between_shards_that_is_cut_costs_one_try(ends: tuple[str, str]) -> None:
    of_d = (1, 0) if ends[0] == "decode-0" else OPEN

    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, of_d, max_num_batched_tokens=16)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(400))
        await gateway.accepted(work, decode, prefill)
        link = lambda: any({ends[0], ends[1]} == {pipe.here, pipe.there} for pipe in cluster.network._pipes)  # noqa: E731
        await settled(link, within=3.0)
        cluster.network.cut(*ends)
        await gateway.ended(work)
        assert gateway.text(work) == expected(prompt_of(400), GREEDY, 8, HEADS)
        assert decode.metrics.value("kvferry_transfer_failure_total", kind="part") == 1
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)

    virtual(scenario)


@pytest.mark.parametrize("phase", ["computing", "fetching", "running"])
def test_a_cancel_frees_what_every_shard_has(phase: str) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=16)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(500), sampling=LONG)
        await gateway.accepted(work, decode, prefill)

        def reached() -> bool:
            worker: Worker[Any] = prefill if phase == "computing" else decode
            sequence = worker.scheduler.sequences.get(work.key)
            return sequence is not None and sequence.state == phase

        await settled(reached, within=3.0)
        await gateway.cancel(work, prefill, decode)
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=0.3)
        again = await gateway.run(prompt_of(100), decode, prefill)
        assert gateway.text(again) == expected(prompt_of(100), GREEDY, 8, HEADS)

    virtual(scenario)


def test_a_dead_d_leaves_nothing_at_ps_shards() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=16)
        other = await cluster.decode("decode-1", model=HEADS, **ranks(OPEN))
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(500))
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: any(len(plane.server) for plane in cluster.planes["prefill-0"]), within=3.0)
        await cluster.kill(decode)
        await settled(lambda: planes_free(cluster), within=1.0)
        again = gateway.again(work)
        await gateway.accepted(again, other, prefill)
        await gateway.ended(again)
        assert gateway.text(again) == expected(prompt_of(500), GREEDY, 8, HEADS)

    virtual(scenario)


def test_a_frozen_shard_of_p_costs_a_stall_and_its_slots_come_back() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=16)
        gateway = await cluster.gateway()
        work = gateway.work(prompt_of(300))
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: any(len(plane.server) for plane in cluster.planes["prefill-0"]), within=3.0)
        cluster.network.freeze("prefill-0-rank-2")
        await settled(lambda: decode.metrics.value("kvferry_transfer_failure_total", kind="stall") >= 1, within=60.0)
        cluster.network.thaw("prefill-0-rank-2")
        await gateway.ended(work)
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=10.0)

    virtual(scenario)


def test_the_leaders_books_show_the_slots_of_its_shards() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=16)
        gateway = await cluster.gateway()

        async def shown(worker: Worker[Any]) -> dict[str, Any]:
            transport = httpx.ASGITransport(debug_app(worker), client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://worker") as client:
                shards: dict[str, Any] = (await client.get("/debug/blocks")).raise_for_status().json()["shards"]
                return shards

        idle = {"1": {"free": 8}, "2": {"free": 8}}
        assert await shown(prefill) == await shown(decode) == idle
        work = gateway.work(prompt_of(500))
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: any(len(plane.fetcher) for plane in cluster.planes["decode-0"]), within=3.0)
        seen = await shown(decode)
        while seen == idle:
            assert work.key in decode.scheduler.sequences, "the hand-off is over"
            seen = await shown(decode)
        assert all(sum(counts.values()) == 8 for counts in seen.values())
        await gateway.ended(work)
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)
        assert await shown(prefill) == await shown(decode) == idle
        # One that doesn't answer is shown as such, and keeps nobody waiting for long.
        channel = decode.shards[0]._channel
        channel.send = lambda payload: None  # type: ignore[method-assign]
        began = now()
        assert await asyncio.gather(shown(decode), shown(decode)) == 2 * [{"1": None, "2": {"free": 8}}]
        assert now() - began <= 2 * COUNT_TIMEOUT_S
        del channel.send
        assert await shown(decode) == idle

    virtual(scenario)


def test_a_shard_that_is_gone_ends_its_worker() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN)
        prefill.shards[0].close()
        await settled(prefill.wedged.is_set, within=1.0)
        assert not decode.wedged.is_set()

    virtual(scenario)


@pytest.mark.parametrize(
    "heads", [((0, 1), (1, 2)), ((0, 1), (1, 4)), ((1, 3), (0, 1)), ((0, 3),)], ids=["missing", "more", "order", "one"]
)
def test_an_address_whose_shards_do_not_have_our_heads_is_refused(heads: tuple[tuple[int, int], ...]) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, (2, 1), OPEN)
        gateway = await cluster.gateway()
        told = address(prefill)
        wrong = WorkerAddress(told.incarnation, told.shards, heads)
        answer = await gateway.ask(decode, DecodeRequest(gateway.work(prompt_of(20)), wrong))
        assert isinstance(answer, Rejected)
        assert answer.reason == "malformed"

    virtual(scenario)


# -- a stranger at a shard of P ------------------------------------------------------------------------------


class Stranger:
    """Somebody who has the data key, and says what he likes to a shard."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.heard: list[Flow] = []
        self._codec = FlowCodec()
        connection.on_message(lambda payload: self.heard.append(self._codec.decode(payload)))

    def say(self, message: Flow) -> None:
        self.connection.send_message(self._codec.encode(message))

    @classmethod
    async def at(cls, cluster: Cluster, decode: DecodeWorker, plane: ShardPlane) -> Stranger:
        return cls(await decode.transport.connect(plane.transport.address, 1.0))


def test_a_part_of_a_pull_that_the_leader_does_not_know_gets_pads_and_nothing_else() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, (1, 0))
        plane = next(iter(cluster.planes["prefill-0"]))
        stranger = await Stranger.at(cluster, decode, plane)
        buffer = memoryview(bytearray(plane.slots.slot_bytes))
        received = stranger.connection.receive(frame_tag(7, 0), buffer)
        stranger.say(FetchPart(7, bytes(16), 1, 0, 1, (1, 2)))
        assert await received == 64, "a pad has but a header"
        await settled(lambda: len(stranger.heard) == 1, within=1.0)
        assert stranger.heard == [Aborted(7, 0, "refused")]
        stranger.say(Abort(7))
        await settled(lambda: planes_free(cluster), within=1.0)
        assert prefill.metrics.value("kvferry_kv_bytes_total", direction="sent") == 0
        stranger.connection.abort()

    virtual(scenario)


@pytest.mark.parametrize("whose", ["another ticket", "older attempt", "number before", "its own"])
def test_a_live_pulls_number_gets_no_kv_without_its_ticket_and_attempt(whose: str) -> None:
    """At a shard, too. Negative control: who has both gets what is computed."""

    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN, max_num_batched_tokens=16)
        gateway = await cluster.gateway()
        older = gateway.work(prompt_of(500))
        await gateway.accepted(older, decode, prefill)
        await gateway.cancel(older, prefill, decode)
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=0.3)
        work = gateway.again(older)
        await gateway.accepted(work, decode, prefill)
        plane = next(iter(cluster.planes["prefill-0"]))
        await settled(lambda: len(plane.server) > 0, within=3.0)
        (part,) = plane.server._parts.values()
        pull_id, from_token = part.outgoing.pull_id, part.outgoing.from_token
        ticket, attempt = {
            "another ticket": (bytes(16), work.attempt),
            "older attempt": (older.ticket, older.attempt),
            "number before": (work.ticket, work.attempt - 1),
            "its own": (work.ticket, work.attempt),
        }[whose]
        stranger = await Stranger.at(cluster, decode, plane)
        buffer = memoryview(bytearray(plane.slots.slot_bytes))
        received = stranger.connection.receive(frame_tag(pull_id, 0), buffer)
        stranger.say(FetchPart(pull_id, ticket, attempt, from_token, 1, (1, 2)))
        num_bytes = await received
        if whose == "its own":
            assert num_bytes > HEADER_BYTES
        else:
            assert num_bytes == HEADER_BYTES, "a pad has but a header"
            await settled(lambda: stranger.heard != [], within=1.0)
            assert stranger.heard == [Aborted(pull_id, 0, "refused")]
        stranger.say(Abort(pull_id))
        await gateway.ended(work)
        assert gateway.text(work) == expected(prompt_of(500), GREEDY, 8, HEADS)
        stranger.connection.abort()
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)

    virtual(scenario)


def test_a_part_that_is_over_before_the_leaders_fetch_comes_keeps_nothing() -> None:
    """What a shard of D and its leader say comes in any order: nobody would say again that such a part is over."""

    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN)
        gateway = await cluster.gateway()
        slots = [decode.slots.try_acquire("test") for _ in range(decode.slots.num_slots)]  # D's leader waits for one
        work = gateway.work(prompt_of(100))
        await gateway.accepted(work, decode, prefill)
        await settled(lambda: len(prefill._sender._by_key) == 1, within=3.0)
        (pull,) = prefill._sender._by_key.values()
        plane = next(iter(cluster.planes["prefill-0"]))
        other = await Stranger.at(cluster, decode, plane)
        other.say(FetchPart(pull.pull_id, work.ticket, work.attempt, 0, 1, (1, 2)))
        await settled(lambda: len(plane.server) == 1, within=1.0)
        other.say(Abort(pull.pull_id))
        await settled(lambda: len(plane.server) == 0, within=1.0)
        await asyncio.sleep(0.1)  # P's leader has heard of both
        assert pull.outgoing is None, "D's leader has not asked yet"
        for slot in slots:
            assert slot is not None
            decode.slots.release(slot)
        await gateway.ended(work)
        assert gateway.text(work) == expected(prompt_of(100), GREEDY, 8, HEADS)
        other.connection.abort()
        await settled(lambda: all_free(prefill, decode) and planes_free(cluster), within=1.0)

    virtual(scenario)


@pytest.mark.parametrize("heads", [(0, 1), (1, 1), (1, 3), (2, 1)], ids=str)
def test_heads_that_a_shard_has_not_end_the_connection(heads: tuple[int, int]) -> None:
    async def scenario(cluster: Cluster) -> None:
        _, decode = await pair(cluster, OPEN, (1, 0))
        stranger = await Stranger.at(cluster, decode, next(iter(cluster.planes["prefill-0"])))
        stranger.say(FetchPart(7, bytes(16), 1, 0, 1, heads))
        await settled(lambda: stranger.connection.closed, within=1.0)

    virtual(scenario)


@pytest.mark.parametrize("message", [Credit(9, 1), Abort(9), Ack(9)], ids=lambda message: type(message).__name__)
def test_what_is_said_of_a_part_that_nobody_knows_is_passed_over(message: Flow) -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, OPEN)
        gateway = await cluster.gateway()
        stranger = await Stranger.at(cluster, decode, next(iter(cluster.planes["prefill-0"])))
        stranger.say(message)
        await asyncio.sleep(0.1)
        assert not stranger.connection.closed
        stranger.connection.abort()
        work = await gateway.run(prompt_of(100), decode, prefill)
        assert gateway.text(work) == expected(prompt_of(100), GREEDY, 8, HEADS)

    virtual(scenario)


def test_a_part_that_asks_for_frames_which_were_never_sent_is_refused() -> None:
    async def scenario(cluster: Cluster) -> None:
        prefill, decode = await pair(cluster, OPEN, (1, 0))
        stranger = await Stranger.at(cluster, decode, next(iter(cluster.planes["prefill-0"])))
        stranger.say(FetchPart(7, bytes(16), 1, 0, 1, (1, 2)))
        stranger.say(Credit(7, 1, (5,)))
        await settled(lambda: stranger.heard != [], within=1.0)
        stranger.connection.abort()
        await settled(lambda: planes_free(cluster) and all_free(prefill), within=1.0)

    virtual(scenario)
