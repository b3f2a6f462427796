"""What a gateway learns from its workers' words and does with it, over the in-memory bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from scripted_worker import CLUSTER, EOS, MODEL, PATIENCE_S, Cluster, ScriptedWorker, completion, tokens_of

from kvferry.kv.events import pack_keys
from kvferry.kv.hashing import block_hashes, root_hash
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot
from kvferry.wire.messages import CacheNews, Codecs
from kvferry.wire.orders import CacheResync
from kvferry.wire.subjects import cache_subject
from kvferry.wire.work import PrefillRequest, Work

pytestmark = pytest.mark.usefixtures("no_leaks")

PROMPT = "x" * 100  # 6 blocks of 16 tokens
ANSWER = [*tokens_of("a text of some tokens"), EOS]


def column(text: str) -> bytes:
    return pack_keys(block_hashes(root_hash("format"), np.array(tokens_of(text), dtype=np.uint32), 16))


async def tell(worker: ScriptedWorker, news: CacheNews) -> None:
    subject = cache_subject(CLUSTER, worker.role, worker.record.name, worker.incarnation)
    await worker.bus.publish(subject, Codecs().cache.encode(news))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.005)


def speaks(worker: ScriptedWorker) -> None:
    def speak(work: Work) -> None:
        worker.say(work, ANSWER)

    worker.accepted = speak


async def test_a_prompt_goes_to_the_prefill_worker_that_has_its_prefix_and_the_cluster_says_why(
    tmp_path: Path,
) -> None:
    async with Cluster(tmp_path) as cluster:
        workers = [await cluster.worker("prefill", f"prefill-{number}") for number in range(4)]
        speaks(await cluster.worker("decode", "decode-0"))
        index = cluster.gateway.fleet.placers[MODEL].snapshot.index
        for number in (2, 1):
            holder = workers[number]
            await tell(holder, CacheEvents(holder.incarnation, 1, column(PROMPT)))
            await until(lambda holder=holder: index.num_blocks(holder.incarnation) == 6)
            await cluster.client.post("/v1/completions", json=completion(PROMPT + "?"))
            assert await holder.wait_for(PrefillRequest)
            placement = (await cluster.client.get("/v1/cluster")).json()["gateway"]["placement"][MODEL]
            assert placement["latest"][0]["prefill"] == holder.record.name
            assert placement["latest"][0]["cached_tokens"] == 96
            await tell(holder, CacheEvents(holder.incarnation, 2, b"", column(PROMPT)))
            await until(lambda: len(index) == 0)
        assert placement["targets"]["max_queue_s"] is None, "JSON has no infinity"
        assert not placement["targets"]["prefill_on_decode"], "the threshold of 0 says never"


async def test_who_is_behind_asks_for_a_snapshot_until_it_has_come(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        worker.load = msgspec.structs.replace(worker.load, cache_seq=5)
        asked = await worker.wait_for(CacheResync, 2)
        assert asked == CacheResync(worker.incarnation)
        await tell(worker, CacheSnapshot(worker.incarnation, 5, 0, 1, column(PROMPT)))
        index = cluster.gateway.fleet.placers[MODEL].snapshot.index
        await until(lambda: index.num_blocks(worker.incarnation) == 6)
        await worker.beat()
        count = len(worker.got(CacheResync))
        for _ in range(3):
            await worker.beat()
        assert len(worker.got(CacheResync)) == count


async def test_garbage_among_the_cache_news_is_counted_and_ignored(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        subject = cache_subject(CLUSTER, "decode", "decode-0", worker.incarnation)
        await worker.bus.publish(subject, b"\x01\xff garbage")
        await until(lambda: sum(m.samples[0].value for m in cluster.metrics.wire_errors.collect() if m.samples))


async def test_a_worker_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        worker = await cluster.worker("decode", "decode-0")
        placer = cluster.gateway.fleet.placers[MODEL]
        await tell(worker, CacheEvents(worker.incarnation, 1, column(PROMPT)))
        await until(lambda: len(placer.snapshot.index) == 6)
        assert placer.block_format == ("format", 16)
        await worker.exit("killed")
        await until(lambda: worker.incarnation not in placer.snapshot.roster)
        assert len(placer.snapshot.index) == 0
        assert placer.block_format is None


async def test_a_queue_that_is_too_long_is_a_429_at_once_that_says_when_to_come_back(tmp_path: Path) -> None:
    scaling = tmp_path / "scaling.yaml"
    scaling.write_text("targets:\n  max_queue_s: 2\n")
    async with Cluster(tmp_path, scaling_file=scaling) as cluster:
        prefill, decode = await cluster.pair()
        speaks(decode)
        roster = cluster.gateway.fleet.placers[MODEL].snapshot.roster
        prefill.load = msgspec.structs.replace(prefill.load, waiting_tokens=10_000, prefill_tokens_per_s=1000.0)
        await until(lambda: roster.queue_seconds(roster.of_role("prefill"), 0, 0.0)[0] > 9)
        refused = await cluster.client.post("/v1/completions", json=completion(PROMPT))
        assert refused.status_code == 429
        assert 8 <= int(refused.headers["retry-after"]) <= 10
        assert not prefill.works
        prefill.load = msgspec.structs.replace(prefill.load, waiting_tokens=0)
        await until(lambda: roster.queue_seconds(roster.of_role("prefill"), 0, 0.0)[0] == 0)
        assert (await cluster.client.post("/v1/completions", json=completion(PROMPT))).status_code == 200


async def test_forecasts_are_corrected_by_what_happens_and_pulls_tell_the_links(tmp_path: Path) -> None:
    async with Cluster(tmp_path) as cluster:
        prefill, decode = await cluster.pair()

        async def speak_slowly(work: Work) -> None:
            for index, token in enumerate(ANSWER):
                decode.publish(work, [(index, token)])
                await asyncio.sleep(0.002)  # so that there is an ITL to learn
            decode.publish(work, end=("stop", len(ANSWER)))

        decode.accepted = lambda work: decode._spawn(speak_slowly(work))
        snapshot = cluster.gateway.fleet.placers[MODEL].snapshot
        decode.load = msgspec.structs.replace(
            decode.load, pulls=((prefill.incarnation, 1 << 20, 0.5), (99, 1 << 20, 0.001))
        )
        await until(lambda: len(snapshot.links) == 1)
        decode.load = msgspec.structs.replace(decode.load, pulls=())
        rates = snapshot.links.matrix([prefill.incarnation, 99], [decode.incarnation])
        assert rates[0, 0] == pytest.approx(2 << 20)
        before = snapshot.ttft_error.bias, snapshot.itl_error.bias
        await cluster.client.post("/v1/completions", json=completion(PROMPT))
        assert snapshot.ttft_error.bias != before[0]
        assert snapshot.itl_error.bias != before[1]
