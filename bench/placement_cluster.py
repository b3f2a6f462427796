"""A cluster of simulated workers under a trace, event by event: gateways with the production's index and columns.

Information is as old as in the real system: workers tell their load and cache events every 250 ms, and each
gateway counts only its own placements in between.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bench.placement_decode import DecodeWorker
from bench.placement_engine import EngineRates
from bench.placement_policies import MODEL, POLICIES, Choice, Policy
from bench.placement_workers import Costs, Job, PrefillWorker
from bench.traces import BLOCK_SIZE, TraceRequest
from kvferry.bus.liveness import BEAT_INTERVAL
from kvferry.wire.beats import WorkerState
from kvferry.wire.fields import Role
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry_gateway.placement.prediction import LAST_PIECE_TOKENS, Snapshot
from kvferry_gateway.placement.targets import Targets

NUM_GATEWAYS: Final = 2
NOISE: Final = 0.05  # sigma of the logarithm of every duration
WARM_UP_SHARE: Final = 0.25  # of the requests, not counted: caches fill, rates are learned


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the clients of one run saw. Seconds."""

    ttft_p50: float
    ttft_p99: float
    itl_p99: float
    goodput: float
    hit_rate: float
    utilisation: float  # of the prefill workers
    prefill_s: float  # computing, mean of a request
    local_share: float
    ttft: np.ndarray
    itl: np.ndarray  # mean of each request

    def goodput_at(self, ttft_s: float, itl_s: float) -> float:
        return float(np.mean((self.ttft <= ttft_s) & (self.itl <= itl_s)))


@dataclass(slots=True)
class _Gateway:
    snapshot: Snapshot
    policy: Policy


class Cluster:
    def __init__(
        self, policy: str, num_prefill: int, num_decode: int, rates: EngineRates, targets: Targets, seed: int
    ) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_events = 0
        self._draw = random.Random(seed)
        self._rates = rates
        costs = Costs(rates, self._noise, self._schedule, self._first_token, self._ended)
        self._costs = costs
        self._prefills: dict[int, PrefillWorker] = {}
        self._decodes: dict[int, DecodeWorker] = {}
        self._draining: set[int] = set()
        self._accepted: Counter[int] = Counter()  # requests that a worker still has something to do with
        self._num_workers = 0  # ever
        # Events reach all gateways alike, so one index serves them; what each has placed is its own.
        shared = Snapshot.empty(targets)
        self._index = shared.index
        self._gateways = []
        for _ in range(NUM_GATEWAYS):
            own = Snapshot.empty(targets)
            snapshot = Snapshot(own.roster, shared.index, own.links, own.ttft_error, own.itl_error, targets)
            self._gateways.append(_Gateway(snapshot, POLICIES[policy]()))
        self._place_of: dict[int, Choice] = {}  # by id of the job, until its end
        self._outstanding = 0
        self._done: list[Job] = []
        self._num_local = 0
        for _ in range(num_prefill):
            self._introduce("prefill")
        for _ in range(num_decode):
            self._introduce("decode")

    def _introduce(self, role: Role) -> Any:
        """A new worker, known to all gateways."""
        self._num_workers += 1
        incarnation = self._num_workers
        worker: PrefillWorker | DecodeWorker
        if role == "prefill":
            worker = self._prefills[incarnation] = PrefillWorker(incarnation, self._costs, self._hand_over)
        else:
            worker = self._decodes[incarnation] = DecodeWorker(incarnation, self._costs)
        record = WorkerRecord(
            role=role, name=f"{role}{incarnation}", incarnation=incarnation, pid=1, subject="", model=MODEL,
            transport="tcp", address=WorkerAddress(incarnation, ()), kv_format_id="kv", numerics_id="n",
            max_model_len=1 << 20, block_size=BLOCK_SIZE, num_blocks=self._rates.num_blocks,
            kv_token_bytes=self._rates.kv_token_bytes,
        )  # fmt: skip
        slot = self._index.attach(incarnation, record.name, record.num_blocks)
        for gateway in self._gateways:
            gateway.snapshot.roster.add(record, slot)
        return worker

    def run(self, requests: list[TraceRequest]) -> Outcome:
        workers: list[Any] = [*self._prefills.values(), *self._decodes.values()]
        for place, worker in enumerate(workers):
            self._beat(worker, 0.0)
            self._schedule(BEAT_INTERVAL * (place + 1) / len(workers), self._beating(worker))
        self._outstanding = len(requests)
        for request in requests:
            self._schedule(request.arrival, self._arriving(request))
        while self._outstanding:
            at, _, call = heapq.heappop(self._events)
            self.now = at
            call(at)
        return self._outcome(requests)

    # -- events ----------------------------------------------------------------------------------------------

    def _schedule(self, at: float, call: Callable[[float], None]) -> None:
        self._num_events += 1
        heapq.heappush(self._events, (at, self._num_events, call))

    def _noise(self) -> float:
        return math.exp(self._draw.gauss(0.0, NOISE))

    def _beating(self, worker: Any) -> Callable[[float], None]:
        def beat(now: float) -> None:
            if worker.incarnation in self._prefills or worker.incarnation in self._decodes:
                self._beat(worker, now)
                self._schedule(now + BEAT_INTERVAL, beat)

        return beat

    def _beat(self, worker: Any, now: float) -> None:
        load = worker.load(now)
        for events in worker.cache.log.batches():
            self._index.apply(events)
        state: WorkerState = "draining" if worker.incarnation in self._draining else "ready"
        for gateway in self._gateways:
            gateway.snapshot.roster.observe(worker.incarnation, load, state, now)

    def _arriving(self, request: TraceRequest) -> Callable[[float], None]:
        return lambda now: self._arrive(request, now)

    def _arrive(self, request: TraceRequest, now: float) -> None:
        number = self._draw.randrange(NUM_GATEWAYS)
        gateway = self._gateways[number]
        choice = gateway.policy.choose(request, gateway.snapshot, self._draw.getrandbits(64), now)
        job = Job(request, number, forecast_ttft_s=choice.ttft_s, forecast_itl_s=choice.itl_s)
        roster = gateway.snapshot.roster
        blocks = -(-(request.prompt_tokens + request.output_tokens) // BLOCK_SIZE)
        self._place_of[id(job)] = choice
        self._accepted[choice.decode] += 1
        if choice.prefill is None:
            self._num_local += 1
            roster.placed(choice.decode, now, choice.prefill_tokens, blocks)
            self._decodes[choice.decode].add(job, now)
            return
        roster.placed(choice.decode, now, 0, blocks)
        roster.placed(choice.prefill, now, choice.prefill_tokens, blocks)
        self._accepted[choice.prefill] += 1
        self._prefills[choice.prefill].add(job, now)

    def _first_token(self, job: Job, now: float) -> None:
        job.first_at = now
        if job.forecast_ttft_s:
            self._gateways[job.gateway].snapshot.ttft_error.observe(job.forecast_ttft_s, job.ttft_s)
        if job.request.output_tokens == 1:
            self._ended(job, now)

    def _hand_over(self, prefill: PrefillWorker, job: Job, now: float) -> None:
        if job.request.output_tokens == 1:
            self._finished_with(prefill.incarnation, now)
            return
        decode = self._decodes[self._place_of[id(job)].decode]
        rates = self._rates
        request = job.request
        missing = request.prompt_tokens - min(decode.cache.depth(request.keys) * BLOCK_SIZE, request.prompt_tokens - 1)
        link = rates.link_bytes_per_s * self._noise()
        whole = missing * rates.kv_token_bytes / link
        last = min(missing, LAST_PIECE_TOKENS) * rates.kv_token_bytes / link
        computing = rates.prefill_s(request.prompt_tokens - job.cached_tokens, job.cached_tokens)
        links = self._gateways[job.gateway].snapshot.links
        links.observe(prefill.incarnation, decode.incarnation, missing * rates.kv_token_bytes, whole)

        def arrived(at: float) -> None:
            self._finished_with(prefill.incarnation, at)
            decode.join(job, at)

        self._schedule(now + max(last, whole - computing), arrived)

    def _ended(self, job: Job, now: float) -> None:
        job.ended_at = now
        self._outstanding -= 1
        self._done.append(job)
        self._finished_with(self._place_of.pop(id(job)).decode, now)
        if job.forecast_itl_s and job.mean_itl_s:
            self._gateways[job.gateway].snapshot.itl_error.observe(job.forecast_itl_s, job.mean_itl_s)

    def _finished_with(self, incarnation: int, now: float) -> None:
        """One request less that the worker has to do with."""
        self._accepted[incarnation] -= 1

    # -- figures ---------------------------------------------------------------------------------------------

    def _outcome(self, requests: list[TraceRequest]) -> Outcome:
        from_arrival = requests[int(WARM_UP_SHARE * len(requests))].arrival
        jobs = [job for job in self._done if job.request.arrival >= from_arrival]
        ttft = np.asarray([job.ttft_s for job in jobs])
        itl = np.asarray([job.mean_itl_s for job in jobs])
        gaps = np.asarray(self._costs.gaps or [(0.0, 1)])
        order = np.argsort(gaps[:, 0])
        at = np.searchsorted(np.cumsum(gaps[order, 1]), 0.99 * gaps[:, 1].sum())
        targets = self._gateways[0].snapshot.targets
        busy = sum(worker.busy_s for worker in self._prefills.values())
        prompts = sum(job.request.prompt_tokens for job in jobs)
        return Outcome(
            ttft_p50=float(np.median(ttft)),
            ttft_p99=float(np.percentile(ttft, 99)),
            itl_p99=float(gaps[order[at], 0]),
            goodput=float(np.mean((ttft <= targets.ttft_s) & (itl <= targets.itl_s))),
            hit_rate=sum(job.cached_tokens for job in jobs) / prompts,
            utilisation=busy / len(self._prefills) / requests[-1].arrival,
            prefill_s=busy / len(requests),
            local_share=self._num_local / len(requests),
            ttft=ttft,
            itl=itl,
        )
