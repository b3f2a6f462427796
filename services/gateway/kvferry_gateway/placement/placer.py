"""What this gateway has learned about a model's workers, and where it sends requests. Pure: the fleet tells it.

heartbeat ──▶ roster (load, rates), links (pulls), index (is a cache event missing?)
cache news ──▶ index
first token, last token ──▶ errors of the forecasts (`Forecast`)
"""

from __future__ import annotations

import math
from collections import Counter, deque
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

from kvferry.wire.beats import Heartbeat
from kvferry.wire.cache_news import CacheEvents
from kvferry.wire.messages import CacheNews
from kvferry.wire.record import WorkerRecord
from kvferry_gateway.placement.block_keys import BlockFormat
from kvferry_gateway.placement.decision import Decision, Placed, Request
from kvferry_gateway.placement.estimates import ForecastError
from kvferry_gateway.placement.forecast import Forecast
from kvferry_gateway.placement.prediction import Snapshot
from kvferry_gateway.placement.prefix_index import Heard
from kvferry_gateway.placement.routing import place
from kvferry_gateway.placement.targets import Targets

MAX_SHOWN: Final = 32  # latest placements, for `/v1/cluster`


@dataclass(frozen=True, slots=True)
class _Full:
    """A worker's queue had no room for a request."""

    priority: int  # of that request; for a more urgent one there may be some
    retry_after: float


@dataclass(frozen=True, slots=True)
class Placing:
    """One decision that was carried out."""

    request_id: str
    attempt: int
    at: float  # of the loop's clock
    placed: Placed


class Placer:
    """One model's. Owns the snapshot that decisions look at, so that none can be for a worker of another model."""

    def __init__(self, targets: Targets, local_prefill_threshold: int) -> None:
        """`local_prefill_threshold` 0: never prefill on a decode worker by choice, whatever `targets` say."""
        by_choice = targets.prefill_on_decode and local_prefill_threshold > 0
        self.snapshot: Final = Snapshot.empty(replace(targets, prefill_on_decode=by_choice))
        self.local_prefill_threshold: Final = local_prefill_threshold
        self._formats: Counter[BlockFormat] = Counter()  # of its workers
        self._full: dict[int, _Full] = {}  # by incarnation, until its next heartbeat
        self._latest: deque[Placing] = deque(maxlen=MAX_SHOWN)

    # -- what is heard ---------------------------------------------------------------------------------------

    def heartbeat(self, beat: Heartbeat, now: float) -> bool:
        """True: cache events of this worker were lost; ask it for a snapshot."""
        record, load, snapshot = beat.record, beat.load, self.snapshot
        incarnation = record.incarnation
        self._full.pop(incarnation, None)
        if incarnation not in snapshot.roster:
            snapshot.roster.add(record, snapshot.index.attach(incarnation, record.name, record.num_blocks))
            self._formats[_block_format(record)] += 1
        snapshot.roster.observe(incarnation, load, beat.state, now)
        if record.role == "decode":
            for prefill, num_bytes, seconds in load.pulls:
                if prefill in snapshot.roster:
                    snapshot.links.observe(prefill, incarnation, num_bytes, seconds)
        return snapshot.index.is_behind(incarnation, load.cache_seq)

    def hear(self, news: CacheNews) -> Heard:
        """What a worker says of its cache."""
        index = self.snapshot.index
        return index.apply(news) if isinstance(news, CacheEvents) else index.load(news)

    def gone(self, worker: WorkerRecord) -> None:
        """Forget all of it."""
        self._full.pop(worker.incarnation, None)
        snapshot = self.snapshot
        if worker.incarnation not in snapshot.roster:
            return
        snapshot.index.detach(worker.incarnation)
        snapshot.roster.remove(worker.incarnation)
        snapshot.links.forget(worker.incarnation)
        self._formats[_block_format(worker)] -= 1
        self._formats = +self._formats

    def refused(self, incarnation: int, priority: int, retry_after: float) -> None:
        """Its queue is full. To ask it again for each request of a crowd would cost more than to serve them: whoever
        else is asked with it, and is not full, computes in vain until it hears that there is no pair."""
        self._full[incarnation] = _Full(priority, retry_after)

    def full_for(self, priority: int) -> dict[int, float]:
        """Workers that have no room for a new request as far as is known, and when to try again, in seconds."""
        return {worker: full.retry_after for worker, full in self._full.items() if priority >= full.priority}

    # -- decisions -------------------------------------------------------------------------------------------

    @property
    def block_format(self) -> BlockFormat | None:
        """Under which prompts are looked up: what most of the workers have; None without a worker."""
        return self._formats.most_common(1)[0][0] if self._formats else None

    def place(self, request: Request, now: float) -> Decision:
        return place(request, self.snapshot, now)

    def placed(self, request: Request, placed: Placed, request_id: str, attempt: int, now: float) -> Forecast:
        """The workers are asked now: count the request until their heartbeats do."""
        roster, prefill, decode = self.snapshot.roster, placed.prefill, placed.decode
        uncached = request.num_tokens - placed.reason.cached_tokens
        blocks = -(-(request.num_tokens + 1) // decode.block_size)
        if prefill is None:
            roster.placed(decode.incarnation, now, uncached, blocks, request.priority)
        else:
            roster.placed(decode.incarnation, now, 0, blocks, request.priority)
            blocks = -(-request.num_tokens // prefill.block_size)
            roster.placed(prefill.incarnation, now, uncached, blocks, request.priority)
        self._latest.append(Placing(request_id, attempt, now, placed))
        return Forecast(placed.reason, now, self.snapshot.ttft_error, self.snapshot.itl_error)

    # -- for operators ---------------------------------------------------------------------------------------

    def report(self, now: float) -> dict[str, Any]:
        """For `/v1/cluster`: what it aims at, what it has learned, and why it placed the latest as it did."""
        snapshot = self.snapshot
        return {
            "targets": {name: shown(value) for name, value in asdict(snapshot.targets).items()},
            "indexed_blocks": len(snapshot.index),
            "link_bytes_per_s": round(snapshot.links.average),
            "ttft_forecast": _learned(snapshot.ttft_error),
            "itl_forecast": _learned(snapshot.itl_error),
            "latest": [
                {
                    "request_id": placing.request_id,
                    "attempt": placing.attempt,
                    "seconds_ago": round(now - placing.at, 3),
                    "prefill": None if placing.placed.prefill is None else placing.placed.prefill.name,
                    "decode": placing.placed.decode.name,
                    **{name: shown(value) for name, value in asdict(placing.placed.reason).items()},
                }
                for placing in reversed(self._latest)
            ],
        }


def _block_format(record: WorkerRecord) -> BlockFormat:
    return BlockFormat(record.kv_format_id, max(1, record.block_size))


def _learned(error: ForecastError) -> dict[str, float]:
    """`actual_to_forecast`: their typical ratio; `sigma`: how much its logarithm varies."""
    return {"actual_to_forecast": round(math.exp(error.bias), 3), "sigma": round(error.sigma, 3)}


def shown(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
