"""Placement with 1,000 workers and a million indexed blocks: time and regret of a decision, memory, heartbeats."""

from __future__ import annotations

import random
import time
import tracemalloc
from collections.abc import Iterator
from typing import Final

from bench.placement_policies import MODEL
from bench.placement_workers import block_hash
from bench.report import Report, percentile
from bench.traces import BLOCK_SIZE
from kvferry.bus.liveness import BEAT_INTERVAL
from kvferry.kv.events import pack_keys
from kvferry.wire.beats import Heartbeat, Load
from kvferry.wire.cache_news import CacheEvents
from kvferry.wire.fields import Role
from kvferry.wire.messages import Codecs
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.fleet.registry import Registry
from kvferry_gateway.placement.decision import Placed, Request
from kvferry_gateway.placement.prediction import Snapshot
from kvferry_gateway.placement.prefix_index import PrefixIndex
from kvferry_gateway.placement.routing import place
from kvferry_gateway.placement.targets import Targets

NUM_WORKERS: Final = 1000
BLOCKS_PER_WORKER: Final = 1000
CHAIN: Final = 50  # blocks of one conversation
SHARED: Final = 8  # of them a system prompt's
NUM_SYSTEM_PROMPTS: Final = 20
NUM_SLOW_LINKS: Final = 20_000


class Chains:
    """Conversations: a system prompt's blocks, then blocks of their own."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed)
        self._next = NUM_SYSTEM_PROMPTS * SHARED
        self.known: list[tuple[int, ...]] = []

    def new(self) -> tuple[int, ...]:
        prompt = self._draw.randrange(NUM_SYSTEM_PROMPTS) * SHARED
        own = range(self._next, self._next + CHAIN - SHARED)
        self._next = own.stop
        chain = (*range(prompt, prompt + SHARED), *own)
        self.known.append(chain)
        return chain

    def requests(self, count: int) -> Iterator[tuple[int, ...]]:
        """Half of them go on with a known conversation."""
        for _ in range(count):
            turn = self.new() if self._draw.random() < 0.5 else self._draw.choice(self.known)
            yield (*turn, *range(self._next, self._next + 10))
            self._next += 10


def record(role: Role, incarnation: int) -> WorkerRecord:
    return WorkerRecord(
        role=role, name=f"{role}{incarnation}", incarnation=incarnation, pid=1, subject=f"kvferry.c.{role}.w",
        model=MODEL, transport="ucx", address=WorkerAddress(incarnation, ("ucx://" + "00" * 60,)), kv_format_id="kv",
        numerics_id="n", max_model_len=32_768, block_size=BLOCK_SIZE, num_blocks=2 * BLOCKS_PER_WORKER,
        kv_token_bytes=23_040,
    )  # fmt: skip


def fill(index: PrefixIndex, chains: Chains, records: list[WorkerRecord]) -> int:
    """Every worker gets its conversations. Returns blocks, counted once for each worker that has them."""
    for worker in records:
        index.attach(worker.incarnation, worker.name, worker.num_blocks)
        keys = {key for _ in range(BLOCKS_PER_WORKER // (CHAIN - SHARED)) for key in chains.new()}
        index.apply(CacheEvents(worker.incarnation, 1, pack_keys(map(block_hash, sorted(keys)))))
    return sum(index.num_blocks(worker.incarnation) for worker in records)


def measure(report: Report, quick: bool) -> None:
    draw = random.Random(0)
    records = [record("prefill" if i % 2 else "decode", i) for i in range(1, NUM_WORKERS + 1)]
    chains = Chains(0)
    snapshot = Snapshot.empty(Targets())
    started = time.process_time()
    num_blocks = fill(snapshot.index, chains, records)
    report.add("index: event, applied", (time.process_time() - started) / num_blocks * 1e6, "µs")
    report.add("index: blocks, counted at each worker", num_blocks)
    for worker in records:
        snapshot.roster.add(worker, snapshot.index.attach(worker.incarnation, worker.name, worker.num_blocks))
        load = Load(
            num_waiting=draw.randrange(3),
            num_running=draw.randrange(12) if worker.role == "decode" else 0,
            waiting_tokens=int(draw.expovariate(1 / 800)) if worker.role == "prefill" else 0,
            free_blocks=BLOCKS_PER_WORKER,
            prefill_tokens_per_s=draw.uniform(1500, 2500),
            decode_step_s=draw.uniform(0.008, 0.02),
        )
        snapshot.roster.observe(worker.incarnation, load, "ready", 0.0)
    for _ in range(NUM_SLOW_LINKS):
        pair = draw.randrange(1, NUM_WORKERS, 2), draw.randrange(2, NUM_WORKERS + 1, 2)
        snapshot.links.observe(*pair, 1e9, draw.uniform(0.5, 5.0))
    _decisions(report, snapshot, chains, 500 if quick else 4000)
    _regret(report, snapshot, chains, 20 if quick else 200)
    _memory(report, records)
    _heartbeats(report, records, 2 if quick else 10)


def _request(keys: tuple[int, ...], seed: int) -> Request:
    return Request(len(keys) * BLOCK_SIZE, len(keys) * BLOCK_SIZE + 64, seed=seed, keys=keys)


def _decisions(report: Report, snapshot: Snapshot, chains: Chains, count: int) -> None:
    seconds = []
    for seed, keys in enumerate(chains.requests(count)):
        request = _request(keys, seed)
        # CPU time: what others do on the machine at the moment is not the decision's.
        started = time.process_time_ns()
        place(request, snapshot, 0.01)
        seconds.append((time.process_time_ns() - started) / 1e6)
    report.add("decision, p50", percentile(seconds, 0.5), "ms")
    report.add("decision, p99", percentile(seconds, 0.99), "ms", 1.0)


def _regret(report: Report, snapshot: Snapshot, chains: Chains, count: int) -> None:
    """How much dearer than the cheapest of all 250,000 pairs."""
    regrets = []
    for seed, keys in enumerate(chains.requests(count)):
        request = _request(keys, seed)
        chosen, full = place(request, snapshot, 0.01), place(request, snapshot, 0.01, width=NUM_WORKERS)
        assert isinstance(chosen, Placed), chosen
        assert isinstance(full, Placed), full
        regrets.append(chosen.cost / full.lowest_cost - 1.0)
    report.add("regret against every pair, mean", 100 * sum(regrets) / len(regrets), "%", 2.0)
    report.add("regret against every pair, p99", 100 * percentile(regrets, 0.99), "%")


def _memory(report: Report, records: list[WorkerRecord]) -> None:
    tracemalloc.start()
    try:
        index, chains = PrefixIndex(), Chains(1)
        chains.known.clear()
        before, _ = tracemalloc.get_traced_memory()
        # Of a tenth of the workers, for tracing is slow; nothing here depends on how many there are.
        tenth = records[::10]
        for worker in tenth:
            index.attach(worker.incarnation, worker.name, worker.num_blocks)
        num_blocks = 0
        for worker in tenth:
            keys = {key for _ in range(BLOCKS_PER_WORKER // (CHAIN - SHARED)) for key in chains.new()}
            chains.known.clear()
            index.apply(CacheEvents(worker.incarnation, 1, pack_keys(map(block_hash, sorted(keys)))))
            num_blocks += index.num_blocks(worker.incarnation)
            del keys
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    report.add("index: memory of a block at a worker", (after - before) / num_blocks, "B")


def _heartbeats(report: Report, records: list[WorkerRecord], rounds: int) -> None:
    """Cores that a gateway spends on hearing 1,000 workers four times a second: decode, registry, columns, index."""
    codec = Codecs().beat
    registry, snapshot = Registry(0.0, {MODEL: ""}), Snapshot.empty(Targets())
    seconds = []
    for beat in range(1, rounds + 1):
        payloads = [
            codec.encode(Heartbeat(beat, "ready", worker, Load(1, 2, 3, 4, 1500.0, 0.01, beat))) for worker in records
        ]
        started = time.process_time()
        for payload in payloads:
            heard = codec.decode(payload)
            assert isinstance(heard, Heartbeat)
            registry.observe(heard, beat * BEAT_INTERVAL)
            worker = heard.record
            slot = snapshot.index.attach(worker.incarnation, worker.name, worker.num_blocks)
            snapshot.roster.add(worker, slot)
            snapshot.roster.observe(worker.incarnation, heard.load, heard.state, beat * BEAT_INTERVAL)
            snapshot.index.is_behind(worker.incarnation, 0)
        seconds.append(time.process_time() - started)
    report.add("heartbeats of 1,000 workers", min(seconds) / BEAT_INTERVAL, "cores", 0.2)
