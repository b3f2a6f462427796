"""Which shard pulls which heads from which, for all ways to shard both workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.engine.ranks.shard import heads_of
from kvferry.wire.record import WorkerAddress
from kvferry.worker.handoff.parts import Part, heads_of_shards, parts_of


def shards(num_kv_heads: int, size: int, num_remote: int) -> list[range]:
    """Of a worker of `size` ranks, the last ones on other hosts."""
    heads = [heads_of(num_kv_heads, 4, size, rank)[1] for rank in range(size)]
    return [range(0, heads[size - num_remote - 1].stop), *heads[size - num_remote :]]


@st.composite
def sharded(draw: st.DrawFn, num_kv_heads: int) -> list[range]:
    size = draw(st.integers(1, 4 * num_kv_heads))
    return shards(num_kv_heads, size, draw(st.integers(0, size - 1)))


@given(st.data(), st.integers(1, 9))
def test_every_shard_gets_all_of_its_heads_once_from_shards_that_have_them(data: st.DataObject, count: int) -> None:
    own, peer = data.draw(sharded(count)), data.draw(sharded(count))
    parts = parts_of(own, peer)
    assert parts is not None
    assert (parts[0].own, parts[0].peer) == (0, 0)
    assert len({(part.own, part.peer) for part in parts}) == len(parts)
    for shard, heads in enumerate(own):
        mine = [part for part in parts if part.own == shard]
        assert [head for part in mine for head in part.heads] == list(heads)
        assert all(part.heads and set(part.heads) <= set(peer[part.peer]) for part in mine)


def test_workers_without_other_hosts_have_one_part() -> None:
    assert parts_of([range(3)], [range(3)]) == (Part(0, 0, range(3)),)


def test_uneven_degrees() -> None:
    """Three KV heads over 2 ranks and over 3, each but the first on another host."""
    two, three = shards(3, 2, 1), shards(3, 3, 2)
    assert parts_of(two, three) == (
        Part(0, 0, range(0, 1)), Part(1, 1, range(1, 2)), Part(1, 2, range(2, 3)),
    )  # fmt: skip
    assert parts_of(three, two) == (
        Part(0, 0, range(0, 1)), Part(1, 1, range(1, 2)), Part(2, 1, range(2, 3)),
    )  # fmt: skip


@pytest.mark.parametrize("peer", [[range(2)], [range(1), range(2, 3)], [range(1, 3), range(0, 1)], []])
def test_a_peer_that_lacks_heads_or_whose_leader_has_none_of_ours(peer: list[range]) -> None:
    assert parts_of([range(3)], peer) is None


def test_what_an_address_says() -> None:
    all_heads = range(3)
    assert heads_of_shards(WorkerAddress(1, ("a",)), all_heads) == (all_heads,)
    assert heads_of_shards(WorkerAddress(1, ("a", "b"), ((0, 1), (1, 3))), all_heads) == (range(0, 1), range(1, 3))


@pytest.mark.parametrize(
    "address",
    [
        WorkerAddress(1, ()),
        WorkerAddress(1, ("a", "b")),
        WorkerAddress(1, ("a",), ((0, 1), (1, 3))),
        WorkerAddress(1, ("a", "b"), ((0, 1), (1, 4))),
        WorkerAddress(1, ("a", "b"), ((0, 1), (2, 2))),
    ],
)
def test_an_address_that_is_none(address: WorkerAddress) -> None:
    assert heads_of_shards(address, range(3)) is None
