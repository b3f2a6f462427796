"""KV of a rank on another host, copied through a channel: the bytes that a rank beside the leader gives."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvferry.engine.memory.rank import MemoryCache
from kvferry.engine.memory.runner import MemorySettings
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.copies import RemoteCache, serve_copies
from kvferry.engine.ranks.followers import Followers
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.errors import RankLost
from kvferry.wire.frame import Piece

KV = MemorySettings(num_layers=3, num_kv_heads=5, head_dim=8).kv_format
HEADS = range(2, 4)  # of the rank that is elsewhere
NUM_BLOCKS = 6
TABLE = np.asarray([4, 0, 5, 2], np.int32)


class Pair:
    """Two caches of the same heads: one here, one behind a channel."""

    def __init__(self) -> None:
        own, theirs = map(SocketChannel, socket.socketpair())
        self.memory = SharedMemory.create(2)
        self.followers = Followers(self.memory, [], {1: own}, "127.0.0.1")
        self.here = MemoryCache(KV, HEADS, NUM_BLOCKS)
        self.there = MemoryCache(KV, HEADS, NUM_BLOCKS)
        self.remote = RemoteCache(self.followers, 1, KV, HEADS)
        self._ends = (own, theirs)
        self._thread = threading.Thread(target=serve_copies, args=(theirs, self.there, KV))
        self._thread.start()

    def close(self) -> None:
        self.followers.close()
        self._thread.join(30)
        for end in self._ends:
            end.close()
        self.memory.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def some(first: int, most: int) -> st.SearchStrategy[tuple[int, int]]:
    """A range of [first, most) that is not empty."""
    return st.tuples(st.integers(first, most - 1), st.integers(1, most)).map(
        lambda drawn: (drawn[0], min(most, drawn[0] + drawn[1]))
    )


@given(some(0, 3), some(0, 4 * KV.block_size), some(0, 5), st.binary(min_size=8, max_size=8))
@settings(max_examples=60)
def test_any_piece_is_copied_as_beside_the_leader_and_other_heads_are_left_alone(
    pair: Pair, layers: tuple[int, int], tokens: tuple[int, int], heads: tuple[int, int], noise: bytes
) -> None:
    piece = Piece(*layers, *tokens, *heads)
    size = piece.num_bytes(KV.head_dim, KV.dtype)
    frame = np.resize(np.frombuffer(noise, np.uint8), size)
    for cache in (pair.here, pair.remote):
        cache.scatter(piece, TABLE, memoryview(frame))
    found = [bytearray(size), bytearray(size)]
    for cache, out in zip((pair.here, pair.remote), found, strict=True):
        cache.gather(piece, TABLE, memoryview(out))
    assert found[0] == found[1]
    assert np.array_equal(pair.here._blocks, pair.there._blocks)


def test_a_rank_that_is_gone_ends_all_channels() -> None:
    pair = Pair()
    pair.followers.close()
    whole = Piece(0, 1, 0, 1, 0, 5)
    with pytest.raises(RankLost, match="rank 1"):
        pair.remote.gather(whole, TABLE, memoryview(bytearray(whole.num_bytes(KV.head_dim, KV.dtype))))
    # Heads that it does not have are nobody's loss.
    other = Piece(0, 1, 0, 1, 0, 2)
    pair.remote.gather(other, TABLE, memoryview(bytearray(other.num_bytes(KV.head_dim, KV.dtype))))
    pair.close()
