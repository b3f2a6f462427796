"""The parts of this worker's pulls that are fetched by a shard of it from a shard of P, but for the one between the
leaders.

    Land ──> landing ──> landed ──Settle──> settling ──Settled──> gone
                └──────> lost ────Settle──────┘

The sequence is pinned from Land until the shard has said Settled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvferry.schedule.sequence import Sequence
from kvferry.wire.record import WorkerAddress
from kvferry.worker.handoff.incoming import Incoming
from kvferry.worker.handoff.orders import Land, Landed, Lost, Progressed, Settle, Settled
from kvferry.worker.handoff.parts import Part
from kvferry.worker.handoff.shards import LandWord, ServeWord, Shard
from kvferry.worker.metrics import WorkerMetrics


@dataclass(slots=True, eq=False)
class _Other:
    """One part."""

    shard: Shard
    sequence: Sequence
    watcher: Watcher
    incoming: Incoming  # whole once it has landed
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Watcher:
    """Who wants to know of the parts of one pull, until they are settled."""

    alive: Callable[[], None]
    landed: Callable[[], None]
    lost: Callable[[Lost], None]


class Others:
    """Of one pull."""

    def __init__(self) -> None:
        self.parts: dict[int, _Other] = {}

    @property
    def whole(self) -> bool:
        return all(other.incoming.whole for other in self.parts.values())

    @property
    def incoming(self) -> list[Incoming]:
        return [other.incoming for other in self.parts.values()]


class OtherParts:
    """Only the event loop calls it."""

    def __init__(
        self,
        shards: tuple[Shard, ...],
        metrics: WorkerMetrics,
        pin: Callable[[Sequence], None],
        unpin: Callable[[Sequence], None],
    ) -> None:
        self._shards = shards
        self._metrics = metrics
        self._pin = pin
        self._unpin = unpin
        self._last = 0
        self._others: dict[int, _Other] = {}  # those that are not settled
        for shard in shards:
            shard.on_word(self._hear)

    def fetch(
        self, pull_id: int, sequence: Sequence, address: WorkerAddress, parts: tuple[Part, ...], watcher: Watcher
    ) -> Others:
        """Let the shards fetch their parts into the sequence's blocks."""
        found = Others()
        blocks = np.ascontiguousarray(sequence.block_table, "<i4").tobytes()
        ticket, attempt = sequence.key
        for part in parts:
            self._last += 1
            incoming = Incoming(pull_id, sequence.cached_tokens, 0)
            other = _Other(self._shards[part.own], sequence, watcher, incoming)
            self._others[self._last] = found.parts[self._last] = other
            self._pin(sequence)
            order = Land(
                self._last, pull_id, ticket, attempt, address.shards[part.peer], address.incarnation,
                (part.heads.start, part.heads.stop), sequence.cached_tokens, sequence.num_context, blocks,
                sequence.work.request_id,
            )  # fmt: skip
            other.shard.tell(order)
        return found

    def settle(self, others: Others, *, right: bool) -> None:
        """The pull is over."""
        for number, other in others.parts.items():
            if not other.settled:
                other.settled = True
                other.shard.tell(Settle(number, right))

    def _hear(self, word: ServeWord | LandWord) -> None:
        other = self._others.get(getattr(word, "part", 0))
        if other is None:
            return
        match word:
            case Progressed() if not other.settled:
                other.watcher.alive()
            case Landed(_, manifest, manifest_frame, num_bytes):
                if other.shard.is_remote:
                    self._metrics.kv_bytes.labels("received").inc(num_bytes)
                other.incoming.manifest, other.incoming.manifest_frame = manifest, manifest_frame
                if not other.settled:
                    other.watcher.alive()
                    other.watcher.landed()
            case Lost() if not other.settled:
                other.watcher.lost(word)
            case Settled(number):
                del self._others[number]
                self._unpin(other.sequence)
