"""Block ledger: holdings, deadlines, and that a leak cannot hide between ledger and pool."""

import json

import numpy as np
import pytest

from kvferry.kv.hashing import root_hash, token_bytes
from kvferry.kv.ledger import BlockState, Ledger, block_ranges
from kvferry.kv.pool import BlockPool

A = (b"a" * 16, 1)
B = (b"b" * 16, 7)


@pytest.fixture
def pool() -> BlockPool:
    return BlockPool(16, 4)


@pytest.fixture
def ledger(pool: BlockPool) -> Ledger:
    return Ledger(pool)


def test_a_holding_goes_through_its_states_and_gives_its_blocks_back(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(A, pool.allocate(3), BlockState.RESERVED, deadline=5.0, now=1.0)
    ledger.move(A, BlockState.FETCHING, deadline=9.0, now=2.0)
    ledger.move(A, BlockState.RUNNING, now=3.0)
    ledger.extend(A, pool.allocate(2))
    ledger.check_integrity()
    holding = ledger.holding(A)
    assert holding is not None
    assert (holding.state, holding.deadline, holding.since, len(holding.blocks)) == (BlockState.RUNNING, None, 3.0, 5)
    pool.release(ledger.drop(A))
    assert ledger.holding(A) is None
    assert pool.num_free == 16
    ledger.check_integrity()


@pytest.mark.parametrize("state", [BlockState.RESERVED, BlockState.FETCHING, BlockState.HELD])
def test_a_state_that_waits_for_another_process_needs_a_deadline(
    pool: BlockPool, ledger: Ledger, state: BlockState
) -> None:
    with pytest.raises(AssertionError, match="deadline"):
        ledger.hold(A, [], state)
    ledger.hold(A, pool.allocate(1), BlockState.RUNNING)
    with pytest.raises(AssertionError, match="deadline"):
        ledger.move(A, state)
    assert ledger.rows(0.0)[0]["state"] == "running", "a refused move changes nothing"


@pytest.mark.parametrize("state", [BlockState.FREE, BlockState.CACHED])
def test_nobody_can_hold_free_or_cached_blocks(ledger: Ledger, state: BlockState) -> None:
    with pytest.raises(AssertionError, match="nobody"):
        ledger.hold(A, [], state, deadline=1.0)


def test_one_holder_has_one_holding_and_another_attempt_is_another_holder(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(A, pool.allocate(1), BlockState.RUNNING)
    ledger.hold((A[0], 2), pool.allocate(1), BlockState.RUNNING)
    with pytest.raises(AssertionError, match="already"):
        ledger.hold(A, [], BlockState.RUNNING)
    ledger.check_integrity()


def test_overdue_names_the_holders_whose_deadline_has_come_oldest_first(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(B, pool.allocate(1), BlockState.HELD, deadline=4.0)
    ledger.hold(A, pool.allocate(1), BlockState.RESERVED, deadline=3.0)
    ledger.hold((b"c" * 16, 1), pool.allocate(1), BlockState.RUNNING)
    assert ledger.overdue(2.9) == []
    assert ledger.overdue(3.0) == [A]
    assert ledger.overdue(4.0) == [B, A]


def test_renewing_a_lease_moves_the_deadline_and_keeps_the_age(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(A, pool.allocate(1), BlockState.HELD, deadline=30.0, now=0.0)
    ledger.move(A, BlockState.HELD, deadline=40.0, now=10.0)
    assert ledger.overdue(30.0) == []
    assert ledger.rows(12.0)[0]["age_s"] == 12.0
    assert ledger.rows(12.0)[0]["seconds_left"] == 28.0


def test_counts_add_up_to_the_pool_with_shared_and_cached_blocks(pool: BlockPool, ledger: Ledger) -> None:
    root = root_hash("x")
    shared = pool.allocate(2)
    pool.publish(shared[0], root, token_bytes(np.arange(4, dtype=np.uint32)))
    pool.acquire(shared)
    ledger.hold(A, shared, BlockState.RESERVED, deadline=1.0)
    ledger.hold(B, shared + pool.allocate(3), BlockState.RUNNING)
    assert ledger.counts() == {
        BlockState.FREE: 11,
        BlockState.CACHED: 0,
        BlockState.RESERVED: 0,
        BlockState.FETCHING: 0,
        BlockState.HELD: 0,
        BlockState.RUNNING: 5,
    }
    pool.release(ledger.drop(B))
    assert ledger.counts()[BlockState.RESERVED] == 2
    pool.release(ledger.drop(A))
    assert (ledger.counts()[BlockState.CACHED], ledger.counts()[BlockState.FREE]) == (1, 15)


def test_rows_are_json_with_the_ticket_in_hex_and_blocks_as_ranges(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(A, pool.allocate(3), BlockState.HELD, deadline=30.0, now=10.0)
    assert json.loads(json.dumps(ledger.rows(12.5))) == [
        {
            "ticket": "61" * 16,
            "attempt": 1,
            "state": "held",
            "num_blocks": 3,
            "blocks": [[0, 2]],
            "age_s": 2.5,
            "seconds_left": 17.5,
        }
    ]


def test_block_ranges_join_neighbours_only() -> None:
    assert block_ranges([7, 1, 2, 3, 9]) == [[1, 3], [7, 7], [9, 9]]
    assert block_ranges([]) == []


def test_a_planted_leak_makes_the_integrity_check_fail(pool: BlockPool, ledger: Ledger) -> None:
    ledger.hold(A, pool.allocate(3), BlockState.RUNNING)
    ledger.check_integrity()
    ledger.drop(A)  # without the release that belongs to it
    with pytest.raises(AssertionError, match=r"in no holding: blocks \[\[0, 2\]\]"):
        ledger.check_integrity()


def test_a_holding_without_references_makes_the_integrity_check_fail(pool: BlockPool, ledger: Ledger) -> None:
    blocks = pool.allocate(2)
    ledger.hold(A, blocks, BlockState.RUNNING)
    ledger.hold(B, blocks[:1], BlockState.RUNNING)  # shares a block without acquiring it
    with pytest.raises(AssertionError, match="not referenced"):
        ledger.check_integrity()
