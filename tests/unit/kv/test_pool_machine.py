"""Random histories of pool and ledger against a model that keeps only what the contract says.

The model knows references per block, which (prefix -> block) pairs are findable, and the order in which
cached blocks were last used. It shares no code or representation with the pool.
"""

from collections import Counter

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvferry.errors import PoolExhausted
from kvferry.kv.events import CacheLog, pack_keys, unpack_keys
from kvferry.kv.hashing import block_hashes, root_hash, token_bytes
from kvferry.kv.ledger import BlockState, Holder, Ledger
from kvferry.kv.pool import BlockPool

SIZE = 2
ROOT = root_hash("machine")
# Few token values: prefixes meet, part and meet again all the time.
PROMPTS = st.lists(st.sampled_from([(1, 1), (1, 2), (2, 1)]), min_size=1, max_size=4)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.integers(2, 8))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.ledger = Ledger(self.pool)
        self.pool.log = CacheLog(1)
        self.told: set[int] = set()  # keys that a gateway knows of
        self.refs: Counter[int] = Counter()
        self.findable: dict[tuple, int] = {}  # prefix of token pairs -> block
        self.lru: list[int] = []  # cached blocks, least recently used first
        self.held: dict[Holder, tuple[list[int], list[tuple]]] = {}
        self.next_attempt = 0

    def model_free(self) -> int:
        return self.pool.num_blocks - sum(1 for count in self.refs.values() if count)

    def model_match(self, pairs: list[tuple]) -> list[int]:
        hits = []
        for end in range(1, len(pairs) + 1):
            block = self.findable.get(tuple(pairs[:end]))
            if block is None:
                break
            hits.append(block)
        return hits

    @rule(pairs=PROMPTS, state=st.sampled_from([BlockState.RESERVED, BlockState.RUNNING, BlockState.HELD]))
    def admit(self, pairs: list[tuple], state: BlockState) -> None:
        self.admit_prompt(pairs, state)

    def admit_prompt(self, pairs: list[tuple], state: BlockState) -> Holder | None:
        """Match, acquire the hits and allocate the rest: what an admission does, all or nothing."""
        tokens = np.array(pairs, dtype=np.uint32).reshape(-1)
        hits = self.pool.match(block_hashes(ROOT, tokens, SIZE), tokens)
        assert hits == self.model_match(pairs)
        fresh = len(pairs) - len(hits)
        evictable_hits = sum(1 for block in hits if not self.refs[block])
        fits = fresh <= self.model_free() - evictable_hits
        assert self.pool.fits(hits, fresh) == fits
        if not fits:
            return None
        self.pool.acquire(hits)
        for block in hits:
            self.refs[block] += 1
            if block in self.lru:
                self.lru.remove(block)
        blocks = hits + self.allocate_fresh(fresh)
        holder = (b"t" * 16, self.next_attempt)
        self.next_attempt += 1
        self.ledger.hold(holder, blocks, state, deadline=1.0)
        self.held[holder] = (blocks, pairs)
        return holder

    def allocate_fresh(self, count: int) -> list[int]:
        num_evicted = max(0, count - (self.model_free() - len(self.lru)))
        evicted, self.lru = self.lru[:num_evicted], self.lru[num_evicted:]
        self.findable = {prefix: block for prefix, block in self.findable.items() if block not in evicted}
        untouched = {block for block in range(self.pool.num_blocks) if self.refs[block]} | set(self.lru)
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not set(blocks) & untouched, "a block in use, or one used later than another left cached, was given away"
        for block in blocks:
            self.refs[block] += 1
        return blocks

    @rule(pairs=PROMPTS)
    def serve_whole(self, pairs: list[tuple]) -> None:
        """Admit, compute and finish one prompt: what fills the cache and makes it overflow."""
        holder = self.admit_prompt(pairs, BlockState.RUNNING)
        if holder is not None:
            self.publish_blocks(holder, len(pairs))
            self.finish_holder(holder)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        holder = data.draw(st.sampled_from(sorted(self.held)))
        self.publish_blocks(holder, data.draw(st.integers(1, len(self.held[holder][1]))))

    def publish_blocks(self, holder: Holder, count: int) -> None:
        blocks, pairs = self.held[holder]
        tokens = np.array(pairs, dtype=np.uint32).reshape(-1)
        hashes = block_hashes(ROOT, tokens, SIZE)
        for index in range(count):
            self.pool.publish(blocks[index], hashes[index], token_bytes(tokens[index * SIZE : (index + 1) * SIZE]))
            self.findable.setdefault(tuple(pairs[: index + 1]), blocks[index])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.finish_holder(data.draw(st.sampled_from(sorted(self.held))))

    def finish_holder(self, holder: Holder) -> None:
        blocks, _ = self.held.pop(holder)
        assert self.ledger.drop(holder) == blocks
        self.pool.release(blocks)
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block] and block in self.findable.values():
                self.lru.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), state=st.sampled_from([BlockState.FETCHING, BlockState.RUNNING, BlockState.HELD]))
    def move(self, data: st.DataObject, state: BlockState) -> None:
        self.ledger.move(data.draw(st.sampled_from(sorted(self.held))), state, deadline=2.0)

    @rule(extra=st.integers(1, 4))
    def ask_for_too_much(self, extra: int) -> None:
        before = self.pool.ref_counts.tolist()
        with pytest.raises(PoolExhausted):
            self.pool.allocate(self.model_free() + extra)
        assert self.pool.ref_counts.tolist() == before

    @precondition(lambda self: len(self.lru) == self.pool.num_blocks)  # else the cache would never fill
    @rule()
    def drop_cache(self) -> None:
        assert self.pool.drop_cache() == len(self.lru)
        self.findable, self.lru = {}, []

    def hash_of(self, prefix: tuple) -> bytes:
        return block_hashes(ROOT, np.array(prefix, dtype=np.uint32).reshape(-1), SIZE)[-1]

    def hear(self) -> None:
        """What the pool logs, batch by batch, is what it has."""
        for batch in self.pool.log.batches():
            self.told |= set(unpack_keys(batch.stored).tolist())
            self.told -= set(unpack_keys(batch.evicted).tolist())
        assert self.told == set(unpack_keys(pack_keys(self.pool.findable())).tolist())

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.ledger.check_integrity()
        assert self.pool.ref_counts.tolist() == [self.refs[block] for block in range(self.pool.num_blocks)]
        assert self.pool.num_free == self.model_free()
        assert set(self.pool.findable()) == {self.hash_of(prefix) for prefix in self.findable}
        self.hear()
        assert [block for block in range(self.pool.num_blocks) if self.pool.is_cached(block)] == sorted(self.lru)
        assert sum(self.ledger.counts().values()) == self.pool.num_blocks


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=100, stateful_step_count=40)
