"""The pool of KV blocks: reference counts and the prefix cache. It names blocks, it never touches KV.

Every block is in one of three states:

                  allocate                      release to 0,
        free  ───────────────▶  in use  ───────────────────────▶  free      if not findable
          ▲                     ref ≥ 1 ───────────────────────▶  cached    if findable
          │                        ▲                                │  │
          │                        └───────────── acquire ──────────┘  │
          └──────────────── evicted by allocate, drop_cache ───────────┘

A block is *findable* from `publish` until it is evicted: `match` then returns it, whether it is in use or
cached. Cached blocks keep their KV and are evicted least recently used first, so they count as free.

All methods are called by the event loop alone. None awaits, none depends on set order.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvferry.errors import PoolExhausted
from kvferry.kv.events import CacheLog
from kvferry.kv.hashing import HASH_BYTES, TOKEN_BYTES, BlockHash, token_bytes
from kvferry.wire.fields import TokenArray


class BlockPool:
    """A fixed number of KV blocks of `block_size` tokens each; block ids are 0 … num_blocks - 1."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0, f"num_blocks {num_blocks}"
        assert block_size > 0, f"block_size {block_size}"
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._ref_counts = np.zeros(num_blocks, dtype=np.int32)  # [num_blocks]
        self._hashes: list[BlockHash | None] = [None] * num_blocks  # of findable blocks
        self._tokens: list[bytes | None] = [None] * num_blocks  # of findable blocks, u32 LE
        self._findable: dict[BlockHash, int] = {}
        # A stack, so that memory that is still warm in the CPU's caches is used again first.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # least recently used first
        self.log: CacheLog | None = None  # is told what becomes findable and what no longer is

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give now: free ones and cached ones, which it may evict."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks that nobody holds but a prefix can find."""
        return len(self._cached)

    @property
    def ref_counts(self) -> npt.NDArray[np.int32]:
        """Read-only view, int32 [num_blocks]."""
        view = self._ref_counts.view()
        view.flags.writeable = False
        return view

    def ref_count(self, block: int) -> int:
        return int(self._ref_counts[block])

    def is_cached(self, block: int) -> bool:
        return block in self._cached

    def findable(self) -> list[BlockHash]:
        """The hashes of all findable blocks, of now."""
        return list(self._findable)

    def guess_depth(self, hashes: Sequence[BlockHash]) -> int:
        """About how many of a chain's first blocks are findable, by bisection.

        Chains are evicted from their end, so as a rule what is findable is a run from the start. Tokens are not
        compared: this is for estimates, `match` is for use.
        """
        return bisect.bisect_left(hashes, True, key=lambda block_hash: block_hash not in self._findable)

    def match(self, hashes: Sequence[BlockHash], tokens: TokenArray) -> list[int]:
        """The longest run of findable blocks from the root, in order.

        `hashes` are those of the full blocks of `tokens` (u32 [num_tokens]), or of the first few.
        Token ids are compared too, so not even a collision of hashes gives one prompt another's KV.
        Takes no reference: the answer holds until the next `allocate`.
        """
        step = self.block_size * TOKEN_BYTES
        prompt = token_bytes(tokens)
        assert len(hashes) * step <= len(prompt), f"{len(hashes)} hashes for {len(tokens)} tokens"
        hits = []
        for index, block_hash in enumerate(hashes):
            block = self._findable.get(block_hash)
            if block is None or self._tokens[block] != prompt[index * step : (index + 1) * step]:
                break
            hits.append(block)
        return hits

    def fits(self, hits: Sequence[int], fresh: int) -> bool:
        """Whether `acquire(hits)` and then `allocate(fresh)` would succeed.

        Hits that are only cached are free until they are acquired, and must not be counted twice.
        """
        return fresh <= self.num_free - len({block for block in hits if block in self._cached})

    def acquire(self, blocks: Sequence[int]) -> None:
        """One more reference to each block, all of which are in use or cached."""
        for block in blocks:
            assert self._ref_counts[block] > 0 or block in self._cached, f"block {block} is free"
        for block in blocks:
            self._cached.pop(block, None)
        np.add.at(self._ref_counts, _index(blocks), 1)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and undefined content, not findable.

        Free blocks go first, then cached ones, least recently used first, which stop being findable.
        Raises `PoolExhausted`, and then nothing has changed.
        """
        assert count >= 0, f"count {count}"
        if count > self.num_free:
            raise PoolExhausted(count, self.num_free)
        while len(self._free) < count:
            self._evict(next(iter(self._cached)))
        blocks = [self._free.pop() for _ in range(count)]
        self._ref_counts[_index(blocks)] = 1
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """One reference less to each block, given in the order of the sequence.

        A findable block that nobody holds any more becomes the most recently used cached one. The last
        block goes first: a chain is of use only from its head, so the head must be evicted last.
        """
        index = _index(blocks)
        np.subtract.at(self._ref_counts, index, 1)
        if len(blocks) and self._ref_counts[index].min() < 0:
            np.add.at(self._ref_counts, index, 1)
            raise AssertionError("a block was released more often than it was held")
        for block in dict.fromkeys(reversed(blocks)):
            if self._ref_counts[block] == 0:
                if self._hashes[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, block_hash: BlockHash, tokens: bytes) -> None:
        """Make a block in use findable: its KV is complete and verified, and nobody will write to it again.

        `tokens` are the block's ids, u32 LE, exactly `block_size` of them. If another block is findable
        under the same hash it stays so, and this one does not become findable.
        """
        assert self._ref_counts[block] > 0, f"block {block} is not held"
        assert len(block_hash) == HASH_BYTES, f"hash of {len(block_hash)} bytes"
        assert len(tokens) == self.block_size * TOKEN_BYTES, f"{len(tokens)} bytes of tokens"
        assert self._hashes[block] in (None, block_hash), f"block {block} already has another name"
        if block_hash not in self._findable:
            self._findable[block_hash] = block
            self._hashes[block] = block_hash
            self._tokens[block] = tokens
            if self.log is not None:
                self.log.stored(block_hash)

    def drop_cache(self) -> int:
        """Make nothing findable. Blocks in use stay with their holders. Returns how many cached ones it freed."""
        dropped = len(self._cached)
        for block in list(self._cached):
            self._evict(block)
        for block in list(self._findable.values()):
            self._forget(block)
        return dropped

    def check_integrity(self) -> None:
        """Derive every block's state anew from the arrays. Raises AssertionError at the first contradiction."""
        assert self._ref_counts.min() >= 0, "negative reference count"
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & cached, f"free and cached: {sorted(free & cached)}"
        unheld = set(np.flatnonzero(self._ref_counts == 0).tolist())
        assert free | cached == unheld, f"neither held nor free, or both: {sorted((free | cached) ^ unheld)}"
        named = {block for block, block_hash in enumerate(self._hashes) if block_hash is not None}
        with_tokens = {block for block, tokens in enumerate(self._tokens) if tokens is not None}
        assert named == with_tokens, f"hash without tokens, or tokens without: {sorted(named ^ with_tokens)}"
        assert cached <= named, f"cached but not findable: {sorted(cached - named)}"
        assert not free & named, f"free but findable: {sorted(free & named)}"
        for block_hash, block in self._findable.items():
            assert self._hashes[block] == block_hash, f"block {block}: found under a hash that it does not have"
        lost = named - set(self._findable.values())
        assert not lost, f"not found under their hashes: {sorted(lost)}"

    def _evict(self, block: int) -> None:
        del self._cached[block]
        self._forget(block)
        self._free.append(block)

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None
        del self._findable[block_hash]
        self._hashes[block] = self._tokens[block] = None
        if self.log is not None:
            self.log.evicted(block_hash)


def _index(blocks: Sequence[int]) -> npt.NDArray[np.int64]:
    """An empty sequence would otherwise become a float array, which cannot index."""
    return np.asarray(blocks, dtype=np.int64)
