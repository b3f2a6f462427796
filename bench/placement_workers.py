"""Workers of the placement simulation: queues, block caches and seconds, no tokens. Here: what both roles share,
and the prefill worker. Pure."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from bench.placement_engine import EngineRates
from bench.traces import BLOCK_SIZE, TraceRequest
from kvferry.kv.events import CacheLog
from kvferry.wire.beats import Load

RATE_SMOOTHING: Final = 0.2

# Calls the function at the time; the clock is the simulation's.
Schedule: TypeAlias = Callable[[float, Callable[[float], None]], None]


def block_hash(key: int) -> bytes:
    """A trace's block id as a block hash: no two share the part that an index keeps."""
    return (key << 4).to_bytes(16, "little")


@dataclass(slots=True)
class Job:
    """One request of the trace on its way."""

    request: TraceRequest
    gateway: int
    left: int = 0  # prompt tokens to compute, then tokens to decode
    cached_tokens: int = 0
    forecast_ttft_s: float = 0.0
    forecast_itl_s: float = 0.0
    first_at: float = math.nan
    ended_at: float = math.nan
    gap_from: float | None = None  # token 0 of a stream that has not decoded yet

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.request.arrival

    @property
    def mean_itl_s(self) -> float:
        gaps = self.request.output_tokens - 1
        return (self.ended_at - self.first_at) / gaps if gaps else 0.0


class BlockCache:
    """Least recently used blocks of one worker, and the events that it publishes about them."""

    def __init__(self, capacity: int, log: CacheLog) -> None:
        self._capacity = capacity
        self._blocks: dict[int, None] = {}
        self.log = log

    def depth(self, keys: tuple[int, ...]) -> int:
        for depth, key in enumerate(keys):
            if key not in self._blocks:
                return depth
        return len(keys)

    def use(self, keys: tuple[int, ...]) -> None:
        """All of them are the latest used, the first one last to go."""
        blocks = self._blocks
        for key in reversed(keys):
            if key in blocks:
                del blocks[key]
            else:
                self.log.stored(block_hash(key))
            blocks[key] = None
        while len(blocks) > self._capacity:
            oldest = next(iter(blocks))
            del blocks[oldest]
            self.log.evicted(block_hash(oldest))


@dataclass(slots=True)
class Costs:
    """What all workers of a run share: rates, noise, the clock, where results go."""

    rates: EngineRates
    noise: Callable[[], float]  # a factor around 1
    schedule: Schedule
    on_first_token: Callable[[Job, float], None]
    on_end: Callable[[Job, float], None]
    gaps: list[tuple[float, int]] = field(default_factory=list)  # (seconds, how many) between tokens


class Worker:
    """What both roles share: a prefill queue in order of arrival, a cache, a measured rate."""

    def __init__(self, incarnation: int, costs: Costs) -> None:
        self.incarnation = incarnation
        self.costs = costs
        self.cache = BlockCache(costs.rates.num_blocks, CacheLog(incarnation))
        self.queue: deque[Job] = deque()
        self.tokens_per_s = 0.0
        self.busy_s = 0.0

    def admit(self, job: Job) -> int:
        """The prefix hit is taken when the prefill begins. Tokens to compute; the last one always is."""
        prompt = job.request.prompt_tokens
        job.cached_tokens = min(self.cache.depth(job.request.keys) * BLOCK_SIZE, prompt - 1)
        return prompt - job.cached_tokens

    def measured(self, num_tokens: int, seconds: float) -> None:
        rate = num_tokens / seconds
        self.tokens_per_s += (rate - self.tokens_per_s) * (RATE_SMOOTHING if self.tokens_per_s else 1.0)

    def waiting_tokens(self) -> int:
        """Queued tokens that the cache of now lacks."""
        return sum(
            max(1, job.request.prompt_tokens - self.cache.depth(job.request.keys) * BLOCK_SIZE) for job in self.queue
        )


class PrefillWorker(Worker):
    def __init__(self, incarnation: int, costs: Costs, hand_over: Callable[[PrefillWorker, Job, float], None]) -> None:
        super().__init__(incarnation, costs)
        self._hand_over = hand_over
        self._job: Job | None = None
        self._span = (0.0, 0.0)

    def add(self, job: Job, now: float) -> None:
        self.queue.append(job)
        if self._job is None:
            self._next(now)

    def _next(self, now: float) -> None:
        self._job = None
        if not self.queue:
            return
        job = self._job = self.queue.popleft()
        job.left = self.admit(job)
        seconds = self.costs.rates.prefill_s(job.left, job.cached_tokens) * self.costs.noise()
        self._span = (now, now + seconds)
        self.busy_s += seconds
        self.costs.schedule(now + seconds, self._done)

    def _done(self, now: float) -> None:
        job = self._job
        assert job is not None
        self.cache.use(job.request.keys)
        self.measured(job.left, self._span[1] - self._span[0])
        self.costs.on_first_token(job, now)
        self._hand_over(self, job, now)
        self._next(now)

    def load(self, now: float) -> Load:
        waiting = self.waiting_tokens()
        if self._job is not None:
            start, end = self._span
            waiting += int(self._job.left * (end - now) / (end - start))
        return Load(
            num_waiting=len(self.queue) + (self._job is not None),
            waiting_tokens=waiting,
            free_blocks=self.costs.rates.num_blocks,
            prefill_tokens_per_s=self.tokens_per_s,
        )
