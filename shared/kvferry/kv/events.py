"""What a worker tells of its prefix cache: which blocks became findable, and which no longer are.

    pool:  stored(hash), evicted(hash)  ──▶  CacheLog  ──▶  CacheEvents 1, 2, 3, …     (a batch per beat)
                                                       ──▶  CacheSnapshot              (asked for after a gap)

On the wire a block is named by its *key*, the first 8 bytes of its hash: placement only guesses with it, and
the worker compares whole hashes and tokens before it uses a block. A batch holds net changes since the batch
before it, so a key is in one column at most, and applying a batch to a later state does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from kvferry.kv.hashing import BlockHash
from kvferry.wire.cache_news import MAX_CACHE_KEYS, CacheEvents, CacheSnapshot

KeyArray = npt.NDArray[np.uint64]


def pack_keys(hashes: Iterable[BlockHash]) -> bytes:
    """The column of a message: u64 LE, one row per block."""
    return b"".join(block_hash[:8] for block_hash in hashes)


def unpack_keys(column: bytes) -> KeyArray:
    """Read-only view, u64 [num_blocks]. A ragged tail is left out."""
    return np.frombuffer(column, dtype="<u8", count=len(column) // 8)


class CacheLog:
    """One worker's numbered cache events. Memory: what changed since the last batch."""

    def __init__(self, incarnation: int) -> None:
        self.incarnation = incarnation
        self.seq = 0  # of the last batch; heartbeats repeat it, so that a lost last batch shows
        self._changes: dict[BlockHash, bool] = {}  # True: stored; absent: as at the last batch

    def stored(self, block_hash: BlockHash) -> None:
        """The block has become findable."""
        self._change(block_hash, True)

    def evicted(self, block_hash: BlockHash) -> None:
        """The block is findable no more."""
        self._change(block_hash, False)

    def _change(self, block_hash: BlockHash, stored: bool) -> None:
        before = self._changes.pop(block_hash, None)
        assert before is not stored, "stored or evicted twice in a row"
        if before is None:
            self._changes[block_hash] = stored

    def batches(self) -> list[CacheEvents]:
        """What happened since the last call, to be published in this order; empty if nothing did.

        A batch that cannot be published is not kept: its number is missing, so gateways ask for a snapshot.
        """
        changes = list(self._changes.items())
        self._changes.clear()
        return [self._batch(changes[i : i + MAX_CACHE_KEYS]) for i in range(0, len(changes), MAX_CACHE_KEYS)]

    def _batch(self, changes: list[tuple[BlockHash, bool]]) -> CacheEvents:
        self.seq += 1
        return CacheEvents(
            self.incarnation,
            self.seq,
            pack_keys(block_hash for block_hash, stored in changes if stored),
            pack_keys(block_hash for block_hash, stored in changes if not stored),
        )

    def snapshot(self, seq: int, keys: KeyArray) -> Iterator[CacheSnapshot]:
        """All parts of a snapshot: `keys`, sorted, are those of all blocks that were findable after batch `seq`.

        They are sorted so that snapshots of one number have equal parts, and parts of two of them may be mixed.
        """
        num_parts = max(1, -(-len(keys) // MAX_CACHE_KEYS))
        for part in range(num_parts):
            column = keys[part * MAX_CACHE_KEYS : (part + 1) * MAX_CACHE_KEYS].tobytes()
            yield CacheSnapshot(self.incarnation, seq, part, num_parts, column)
