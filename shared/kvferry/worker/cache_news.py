"""Tells all gateways what this worker's prefix cache holds: batches with each heartbeat, snapshots when asked."""

from __future__ import annotations

import asyncio
from typing import Final

import numpy as np

from kvferry.bus.base import Bus
from kvferry.errors import BusError
from kvferry.kv.events import CacheLog, pack_keys, unpack_keys
from kvferry.kv.pool import BlockPool
from kvferry.lane import Lane
from kvferry.runtime import TaskSet
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot
from kvferry.wire.messages import Codecs

PACKED_AT_ONCE: Final = 4096  # keys that a snapshot packs before the loop may do something else: below 1 ms


class CacheNews:
    """Only the event loop calls it. A pool's blocks are logged from here on, so it must be empty still."""

    def __init__(self, pool: BlockPool, incarnation: int, bus: Bus, subject: str, lane: Lane, tasks: TaskSet) -> None:
        assert not pool.findable(), "blocks that became findable before anyone was told"
        self._log = pool.log = CacheLog(incarnation)
        self._pool = pool
        self._bus = bus
        self._subject = subject
        self._lane = lane
        self._tasks = tasks
        self._codec = Codecs().cache
        self._asked = False
        self._snapshot: asyncio.Task[None] | None = None

    @property
    def seq(self) -> int:
        """Number of the last batch, for the heartbeat."""
        return self._log.seq

    def ask(self) -> None:
        """A gateway has lost something: publish a snapshot with the next heartbeat, one for all that ask till then."""
        self._asked = True

    async def publish(self) -> None:
        """What has changed since the last heartbeat, and the beginning of a snapshot that was asked for."""
        batches = self._log.batches()
        if self._asked and (self._snapshot is None or self._snapshot.done()):
            self._asked = False
            # Taken in the same turn as the batches: it is the cache after the last of them.
            self._snapshot = self._tasks.spawn(self._publish_all(self.seq, self._pool.findable()), "cache-snapshot")
        for batch in batches:
            await self._send(batch)

    async def _publish_all(self, seq: int, findable: list[bytes]) -> None:
        columns = []
        for start in range(0, len(findable), PACKED_AT_ONCE):
            columns.append(pack_keys(findable[start : start + PACKED_AT_ONCE]))
            await asyncio.sleep(0)
        keys = await self._lane.run(np.sort, unpack_keys(b"".join(columns)))  # without the interpreter's lock
        for part in self._log.snapshot(seq, keys):
            await self._send(part)
            await asyncio.sleep(0)

    async def _send(self, news: CacheEvents | CacheSnapshot) -> None:
        try:
            await self._bus.publish(self._subject, self._codec.encode(news))
        except BusError:
            return  # its number is missing: whoever notices asks for a snapshot
