"""KV memory of one worker: who gets blocks, and when they are free again.

The rules are those of `docs/protocol.md`, "Memory rules":
- a queued sequence holds nothing; the prefix hit is taken in the reservation (2);
- a reservation is all or nothing (3);
- blocks are released only when no step, gather or scatter uses them: `pin` and `unpin` bracket each use.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvferry.errors import PoolExhausted
from kvferry.kv.ledger import BlockState, Ledger
from kvferry.kv.pool import BlockPool
from kvferry.schedule.sequence import Sequence
from kvferry.wire.work import NUM_PRIORITY_CLASSES, priority_class


class KVMemory:
    """The block pool and its ledger, in terms of sequences."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)
        self.ledger = Ledger(self.pool)
        self.block_size = block_size
        self.num_doomed = 0  # blocks that come free as soon as the steps and copies that use them end
        self.hit_tokens = 0
        self.queried_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def reserve(
        self,
        sequence: Sequence,
        num_tokens: int,
        max_hit: int,
        state: BlockState,
        now: float,
        deadline: float | None = None,
        watermark: int = 0,
    ) -> bool:
        """Give the sequence blocks for `num_tokens`, a cached prefix of at most `max_hit` tokens among them.

        All or nothing: False leaves pool, ledger and sequence as they were. `watermark` blocks stay free.
        On success `num_computed` and `cached_tokens` are the hit.
        """
        hashes = sequence.hashes[: max_hit // self.block_size]
        hits = self.pool.match(hashes, sequence.context)
        fresh = self.blocks_for(num_tokens) - len(hits)
        if not self.pool.fits(hits, fresh + watermark):
            return False
        self.pool.acquire(hits)
        blocks = hits + self.pool.allocate(fresh)
        self.ledger.hold(sequence.key, blocks, state, deadline=deadline, now=now)
        sequence.append_blocks(blocks)
        sequence.num_computed = sequence.cached_tokens = len(hits) * self.block_size
        sequence.num_published = len(hits)
        self.hit_tokens += sequence.cached_tokens
        self.queried_tokens += sequence.num_context
        return True

    def lacking(self, sequence: Sequence, num_tokens: int, max_hit: int, watermark: int = 0) -> int:
        """Blocks that others must give back before `reserve` with the same arguments can succeed.

        Those that are on their way back already count as free.
        """
        hits = self.pool.match(sequence.hashes[: max_hit // self.block_size], sequence.context)
        fresh = self.blocks_for(num_tokens) - len(hits) + watermark
        unheld = sum(self.pool.is_cached(block) for block in hits)
        return max(0, fresh - (self.pool.num_free - unheld) - self.num_doomed)

    def uncomputed(self, waiting: Iterable[Sequence], computing: Iterable[Sequence]) -> tuple[int, ...]:
        """Tokens of these prompts that are left to compute, by priority class; what the cache has now is not."""
        tokens = [0] * NUM_PRIORITY_CLASSES
        for sequence in waiting:
            hit = min(self.pool.guess_depth(sequence.hashes) * self.block_size, sequence.max_hit)
            tokens[priority_class(sequence.work.priority)] += sequence.num_context - hit
        for sequence in computing:
            tokens[priority_class(sequence.work.priority)] += sequence.num_context - sequence.num_computed
        return tuple(tokens)

    def grow(self, sequence: Sequence, num_drawing: int = 0) -> bool:
        """A block for the last token, if it needs one; or for the `num_drawing` behind it. False when the pool is out
        of blocks."""
        wanted = self.blocks_for(sequence.num_tokens + num_drawing) - sequence.num_blocks
        if wanted <= 0:
            return True
        try:
            blocks = self.pool.allocate(wanted)
        except PoolExhausted:
            return False
        self.ledger.extend(sequence.key, blocks)
        sequence.append_blocks(blocks)
        return True

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens findable."""
        full = min(num_tokens // self.block_size, len(sequence.hashes))
        for index in range(sequence.num_published, full):
            tokens = sequence.tokens[index * self.block_size : (index + 1) * self.block_size]
            self.pool.publish(int(sequence.block_table[index]), sequence.hashes[index], tokens.tobytes())
        sequence.num_published = max(sequence.num_published, full)

    def move(self, sequence: Sequence, state: BlockState, now: float, deadline: float | None = None) -> None:
        self.ledger.move(sequence.key, state, deadline=deadline, now=now)

    def pin(self, sequence: Sequence) -> None:
        """A step or copy begins to use the sequence's blocks."""
        sequence.pins += 1

    def unpin(self, sequence: Sequence) -> bool:
        """It has ended. True if this freed a sequence that `free` had to leave."""
        assert sequence.pins > 0, "unpinned more often than pinned"
        sequence.pins -= 1
        if sequence.doomed and sequence.pins == 0:
            self._release(sequence)
            return True
        return False

    def free(self, sequence: Sequence) -> bool:
        """Give the blocks back, now or when the last user unpins. True if now (or if there are none)."""
        if sequence.pins:
            if not sequence.doomed:
                sequence.doomed = True
                self.num_doomed += sequence.num_blocks
            return False
        self._release(sequence)
        return True

    def _release(self, sequence: Sequence) -> None:
        if sequence.doomed:
            sequence.doomed = False
            self.num_doomed -= sequence.num_blocks
        if sequence.num_blocks:
            self.pool.release(self.ledger.drop(sequence.key))
            sequence.num_blocks = 0

    def check_integrity(self) -> None:
        self.ledger.check_integrity()
