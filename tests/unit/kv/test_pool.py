"""Block pool: what is findable, what is evicted first, and what a failed call leaves behind."""

import time

import numpy as np
import pytest

from kvferry.errors import PoolExhausted
from kvferry.kv.events import CacheLog, pack_keys
from kvferry.kv.hashing import block_hashes, root_hash, token_bytes
from kvferry.kv.pool import BlockPool

SIZE = 4
ROOT = root_hash("test")


def prompt(num_blocks: int, first: int = 0) -> np.ndarray:
    return np.arange(first, first + num_blocks * SIZE, dtype=np.uint32)


def hashes_of(tokens: np.ndarray) -> list[bytes]:
    return block_hashes(ROOT, tokens, SIZE)


def publish_all(pool: BlockPool, blocks: list[int], tokens: np.ndarray) -> None:
    for index, (block, block_hash) in enumerate(zip(blocks, hashes_of(tokens), strict=True)):
        pool.publish(block, block_hash, token_bytes(tokens[index * SIZE : (index + 1) * SIZE]))


def cache(pool: BlockPool, tokens: np.ndarray) -> list[int]:
    blocks = pool.allocate(len(tokens) // SIZE)
    publish_all(pool, blocks, tokens)
    pool.release(blocks)
    pool.check_integrity()
    return blocks


def test_a_released_prefix_is_found_again_from_the_root() -> None:
    pool = BlockPool(8, SIZE)
    blocks = cache(pool, prompt(3))
    longer = np.concatenate([prompt(3), prompt(2, first=500)])
    assert pool.match(hashes_of(longer), longer) == blocks
    assert (pool.num_free, pool.num_cached) == (8, 3)


def test_a_match_stops_at_the_first_block_that_differs() -> None:
    pool = BlockPool(8, SIZE)
    blocks = cache(pool, prompt(3))
    other = prompt(3)
    other[SIZE] += 1
    assert pool.match(hashes_of(other), other) == blocks[:1]


def test_a_match_compares_token_ids_and_not_only_hashes() -> None:
    pool = BlockPool(8, SIZE)
    cache(pool, prompt(2))
    stranger = prompt(2, first=900)
    # A planted collision: the stranger's prompt comes with the hashes of the cached one.
    assert pool.match(hashes_of(prompt(2)), stranger) == []
    assert pool.match(hashes_of(prompt(2)), prompt(2)) != []


def test_a_match_takes_no_reference() -> None:
    pool = BlockPool(4, SIZE)
    blocks = cache(pool, prompt(2))
    pool.match(hashes_of(prompt(2)), prompt(2))
    assert [pool.ref_count(block) for block in blocks] == [0, 0]
    assert all(pool.is_cached(block) for block in blocks)


def test_a_block_in_use_is_found_and_shared() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(2)
    publish_all(pool, blocks, prompt(2))
    hits = pool.match(hashes_of(prompt(2)), prompt(2))
    pool.acquire(hits)
    assert [pool.ref_count(block) for block in blocks] == [2, 2]
    pool.release(blocks)
    assert pool.num_cached == 0
    pool.release(hits)
    assert pool.num_cached == 2


def test_the_least_recently_used_chain_is_evicted_first_and_from_its_tail() -> None:
    pool = BlockPool(6, SIZE)
    old, new = prompt(3), prompt(3, first=100)
    cache(pool, old)
    cache(pool, new)
    for left_of_old in (2, 1, 0):
        pool.allocate(1)
        assert len(pool.match(hashes_of(old), old)) == left_of_old
        assert len(pool.match(hashes_of(new), new)) == 3
    pool.allocate(1)
    assert len(pool.match(hashes_of(new), new)) == 2
    pool.check_integrity()


def test_using_a_cached_chain_makes_it_the_last_to_be_evicted() -> None:
    pool = BlockPool(4, SIZE)
    first, second = prompt(2), prompt(2, first=100)
    blocks = cache(pool, first)
    cache(pool, second)
    pool.acquire(blocks)
    pool.release(blocks)
    pool.allocate(2)
    assert pool.match(hashes_of(first), first) == blocks
    assert pool.match(hashes_of(second), second) == []


def test_free_blocks_are_used_before_anything_is_evicted() -> None:
    pool = BlockPool(4, SIZE)
    blocks = cache(pool, prompt(2))
    assert not set(pool.allocate(2)) & set(blocks)
    assert pool.match(hashes_of(prompt(2)), prompt(2)) == blocks


def test_exhaustion_changes_nothing() -> None:
    pool = BlockPool(4, SIZE)
    pool.allocate(1)
    blocks = cache(pool, prompt(2))
    before = (pool.num_free, pool.num_cached, pool.ref_counts.tolist())
    with pytest.raises(PoolExhausted) as error:
        pool.allocate(4)
    assert (error.value.wanted, error.value.free) == (4, 3)
    assert (pool.num_free, pool.num_cached, pool.ref_counts.tolist()) == before
    assert pool.match(hashes_of(prompt(2)), prompt(2)) == blocks
    pool.check_integrity()


def test_fits_does_not_count_a_cached_hit_as_free_too() -> None:
    pool = BlockPool(4, SIZE)
    hits = cache(pool, prompt(2))
    assert pool.num_free == 4
    assert pool.fits(hits, 2)
    assert not pool.fits(hits, 3)
    assert pool.fits([], 4)
    pool.acquire(hits)
    assert pool.fits(hits, 2), "a hit in use costs no free block"
    pool.allocate(2)


def test_the_first_publisher_of_a_hash_keeps_it() -> None:
    pool = BlockPool(4, SIZE)
    first, second = pool.allocate(1), pool.allocate(1)
    publish_all(pool, first, prompt(1))
    publish_all(pool, second, prompt(1))
    assert pool.match(hashes_of(prompt(1)), prompt(1)) == first
    pool.release(second)
    assert pool.num_cached == 0, "the duplicate is free at once"
    pool.release(first)
    assert pool.is_cached(first[0])


def test_dropping_the_cache_frees_what_nobody_holds_and_hides_the_rest() -> None:
    pool = BlockPool(6, SIZE)
    cache(pool, prompt(2))
    held = pool.allocate(1)
    publish_all(pool, held, prompt(1, first=100))
    assert pool.drop_cache() == 2
    assert (pool.num_free, pool.num_cached) == (5, 0)
    assert pool.match(hashes_of(prompt(1, first=100)), prompt(1, first=100)) == []
    pool.release(held)
    assert pool.num_cached == 0
    pool.check_integrity()


def test_releasing_a_block_twice_is_caught_and_changes_nothing() -> None:
    pool = BlockPool(4, SIZE)
    kept, gone = pool.allocate(1), pool.allocate(1)
    pool.release(gone)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(kept + gone)
    assert pool.ref_count(kept[0]) == 1
    with pytest.raises(AssertionError, match="more often"):
        pool.release(kept * 2)
    assert pool.ref_count(kept[0]) == 1
    pool.check_integrity()


def test_a_free_block_can_neither_be_acquired_nor_published() -> None:
    pool = BlockPool(4, SIZE)
    with pytest.raises(AssertionError, match="free"):
        pool.acquire([0])
    with pytest.raises(AssertionError, match="not held"):
        pool.publish(0, hashes_of(prompt(1))[0], token_bytes(prompt(1)))


def test_a_published_block_cannot_get_another_name_or_a_partial_one() -> None:
    pool = BlockPool(4, SIZE)
    blocks = pool.allocate(1)
    publish_all(pool, blocks, prompt(1))
    with pytest.raises(AssertionError, match="another name"):
        publish_all(pool, blocks, prompt(1, first=100))
    with pytest.raises(AssertionError, match="bytes of tokens"):
        pool.publish(blocks[0], hashes_of(prompt(1))[0], token_bytes(prompt(1)[:3]))


def test_reference_counts_cannot_be_written_from_outside() -> None:
    with pytest.raises(ValueError, match="read-only"):
        BlockPool(4, SIZE).ref_counts[0] = 1


@pytest.mark.parametrize(
    "plant",
    [
        lambda pool: pool._free.pop(),  # lost block
        lambda pool: pool._free.append(pool._free[0]),  # free twice
        lambda pool: pool._ref_counts.__setitem__(pool._free[0], 1),  # free, yet held
        lambda pool: pool._findable.clear(),  # cached, but no longer findable
        lambda pool: pool._cached.popitem(),  # findable, but neither held nor cached
        lambda pool: pool._ref_counts.__setitem__(0, -1),
    ],
)
def test_the_integrity_check_finds_each_planted_fault(plant) -> None:
    pool = BlockPool(6, SIZE)
    cache(pool, prompt(2))
    pool.allocate(1)
    pool.check_integrity()
    plant(pool)
    with pytest.raises(AssertionError):
        pool.check_integrity()


def test_hashing_and_matching_4096_tokens_takes_milliseconds_at_most() -> None:
    pool = BlockPool(512, 16)
    tokens = np.random.default_rng(1).integers(0, 49152, 4096, dtype=np.uint32)
    blocks = pool.allocate(256)
    for index, (block, block_hash) in enumerate(zip(blocks, block_hashes(ROOT, tokens, 16), strict=True)):
        pool.publish(block, block_hash, token_bytes(tokens[index * 16 : (index + 1) * 16]))
    best = float("inf")
    for _ in range(20):  # the best of several, since other processes share the cores
        start = time.perf_counter()
        assert pool.match(block_hashes(ROOT, tokens, 16), tokens) == blocks
        best = min(best, time.perf_counter() - start)
    assert best < 4e-3, f"{best * 1e3:.2f} ms for 4,096 tokens: 1 ms per 1,000 tokens is the limit"


def test_the_depth_of_a_chain_is_guessed_without_looking_at_every_block() -> None:
    pool = BlockPool(16, SIZE)
    cache(pool, prompt(10))
    assert [pool.guess_depth(hashes_of(prompt(n))) for n in (0, 1, 10)] == [0, 1, 10]
    assert pool.guess_depth(hashes_of(prompt(14))) == 10
    assert pool.guess_depth(hashes_of(prompt(5, first=900))) == 0
    pool.release(pool.allocate(9))  # evicts the chain's end
    assert pool.guess_depth(hashes_of(prompt(14))) == len(pool.match(hashes_of(prompt(14)), prompt(14))) == 7


def test_only_what_becomes_findable_is_logged() -> None:
    pool = BlockPool(8, SIZE)
    pool.log = CacheLog(1)
    cache(pool, prompt(2))
    twin = pool.allocate(2)
    publish_all(pool, twin, prompt(2))
    (batch,) = pool.log.batches()
    assert (batch.stored, batch.evicted) == (pack_keys(hashes_of(prompt(2))), b"")
    pool.release(twin)
    assert pool.log.batches() == [], "the twins were never findable"
    pool.drop_cache()
    (batch,) = pool.log.batches()
    assert (batch.stored, len(batch.evicted)) == (b"", 16)
