"""The block ledger: who holds which blocks, in which state, and by when they must be free.

    P:   reserved ──▶ running ──▶ held            dropped on acknowledgement, cancel or lease expiry
    D:   reserved ──▶ fetching ──▶ running        dropped at the end of the sequence or on cancel

The pool counts references; the ledger says whose they are. Together they answer "why is this block not
free?", and their agreement is what a leak breaks: `check_integrity` is run after every test.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from kvferry.kv.pool import BlockPool

Holder: TypeAlias = tuple[bytes, int]  # (ticket, attempt)


class BlockState(StrEnum):
    FREE = "free"  # nobody's (derived from the pool)
    CACHED = "cached"  # nobody's, but findable by prefix (derived from the pool)
    RESERVED = "reserved"  # taken for a sequence whose KV is not on its way yet
    FETCHING = "fetching"  # D: a pull writes into them
    RUNNING = "running"  # the engine computes on them
    HELD = "held"  # P: complete, waiting to be pulled


# These wait for another process, which may be gone: each must end by a deadline.
TIMED_STATES: Final = frozenset({BlockState.RESERVED, BlockState.FETCHING, BlockState.HELD})
# A block shared by several holdings counts once, in the last of these states that one of them is in.
_COUNT_ORDER: Final = (BlockState.RESERVED, BlockState.FETCHING, BlockState.HELD, BlockState.RUNNING)
# The holdings of a block by state are one number, 15 bits a state: its size tells the last state that one is in.
_ONE: Final = {state: 1 << 15 * place for place, state in enumerate(_COUNT_ORDER)}
_BOUNDS: Final = np.array(list(_ONE.values()), dtype=np.int64)


@dataclass(slots=True)
class Holding:
    """What one (ticket, attempt) holds. Times are seconds of the worker's own loop clock."""

    holder: Holder
    blocks: list[int]  # in the order of the sequence; one pool reference each
    state: BlockState
    deadline: float | None  # when the blocks must be free; None only in state running
    since: float  # when this state was entered


class Ledger:
    """All holdings of one pool. It records; the caller moves the references in the pool."""

    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._holdings: dict[Holder, Holding] = {}
        self._named = np.zeros(pool.num_blocks, dtype=np.int64)  # [num_blocks]: sum of `_ONE` over its holdings
        self._counts = np.zeros(1 + len(_COUNT_ORDER), dtype=np.int64)  # as `_by_state`; the first is not kept up

    def __len__(self) -> int:
        return len(self._holdings)

    def __iter__(self) -> Iterator[Holding]:
        """Oldest holding first."""
        return iter(self._holdings.values())

    def hold(
        self,
        holder: Holder,
        blocks: Sequence[int],
        state: BlockState,
        deadline: float | None = None,
        now: float = 0.0,
    ) -> None:
        """Record blocks whose references the caller has taken, for a holder that holds nothing yet."""
        assert holder not in self._holdings, "the holder has a holding already"
        _check_deadline(state, deadline)
        self._holdings[holder] = Holding(holder, list(blocks), state, deadline, now)
        self._count(blocks, _ONE[state])

    def extend(self, holder: Holder, blocks: Sequence[int]) -> None:
        """Append blocks whose references the caller has taken."""
        holding = self._holdings[holder]
        holding.blocks.extend(blocks)
        self._count(blocks, _ONE[holding.state])

    def move(self, holder: Holder, state: BlockState, deadline: float | None = None, now: float = 0.0) -> None:
        """Enter a state, or renew the deadline of the present one (its age then goes on)."""
        _check_deadline(state, deadline)
        holding = self._holdings[holder]
        if holding.state is not state:
            self._count(holding.blocks, _ONE[state] - _ONE[holding.state])
            holding.state = state
            holding.since = now
        holding.deadline = deadline

    def drop(self, holder: Holder) -> list[int]:
        """End a holding. The caller releases the returned blocks in the pool."""
        holding = self._holdings.pop(holder)
        self._count(holding.blocks, -_ONE[holding.state])
        return holding.blocks

    def holding(self, holder: Holder) -> Holding | None:
        return self._holdings.get(holder)

    def overdue(self, now: float) -> list[Holder]:
        """Holders whose deadline has come, oldest holding first."""
        return [h.holder for h in self._holdings.values() if h.deadline is not None and h.deadline <= now]

    def counts(self) -> dict[BlockState, int]:
        """Blocks by state; every block counts once, so the sum is the size of the pool. Costs the same at any size."""
        return {
            BlockState.FREE: self._pool.num_free - self._pool.num_cached,
            BlockState.CACHED: self._pool.num_cached,
            **dict(zip(_COUNT_ORDER, self._counts[1:].tolist(), strict=True)),
        }

    def _count(self, blocks: Sequence[int], change: int) -> None:
        """These blocks of one holding, each named once, enter, change or leave a state."""
        index = np.asarray(blocks, dtype=np.int64)
        before = self._named[index]
        after = before + change
        self._named[index] = after
        self._counts += _by_state(after) - _by_state(before)

    def rows(self, now: float) -> list[dict[str, Any]]:
        """One JSON-ready object per holding, oldest first, for `GET /debug/blocks`."""
        return [
            {
                "ticket": holding.holder[0].hex(),
                "attempt": holding.holder[1],
                "state": holding.state.value,
                "num_blocks": len(holding.blocks),
                "blocks": block_ranges(holding.blocks),
                "age_s": round(now - holding.since, 3),
                "seconds_left": None if holding.deadline is None else round(holding.deadline - now, 3),
            }
            for holding in self._holdings.values()
        ]

    def check_integrity(self) -> None:
        """Every reference in the pool belongs to a holding, and every holding has its references.

        Raises AssertionError naming the blocks that leaked or are held without a reference.
        """
        self._pool.check_integrity()
        listed: list[int] = []
        ones: list[int] = []
        for holder, holding in self._holdings.items():
            assert holding.holder == holder, "a holding stands under another holder"
            _check_deadline(holding.state, holding.deadline)
            listed += holding.blocks
            ones += [_ONE[holding.state]] * len(holding.blocks)
        blocks = np.asarray(listed, dtype=np.int64)
        fresh = np.zeros_like(self._named)
        np.add.at(fresh, blocks, np.asarray(ones, dtype=np.int64))
        assert (fresh == self._named).all(), "a block's holdings are miscounted"
        assert (self._counts[1:] == _by_state(fresh)[1:]).all(), "the blocks of a state are miscounted"
        # [num_blocks]: holdings naming the block
        named = np.bincount(blocks, minlength=self._pool.num_blocks)
        leaked = np.flatnonzero(self._pool.ref_counts > named).tolist()
        assert not leaked, f"referenced, but in no holding: blocks {block_ranges(leaked)}"
        unbacked = np.flatnonzero(self._pool.ref_counts < named).tolist()
        assert not unbacked, f"in a holding, but not referenced: blocks {block_ranges(unbacked)}"


def _by_state(named: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many of these blocks are nobody's, and how many in each state of `_COUNT_ORDER`."""
    return np.bincount(np.searchsorted(_BOUNDS, named, side="right"), minlength=1 + len(_COUNT_ORDER))


def block_ranges(blocks: Sequence[int]) -> list[list[int]]:
    """Runs of consecutive ids as [first, last], ascending."""
    ranges: list[list[int]] = []
    for block in sorted(blocks):
        if ranges and block == ranges[-1][1] + 1:
            ranges[-1][1] = block
        else:
            ranges.append([block, block])
    return ranges


def _check_deadline(state: BlockState, deadline: float | None) -> None:
    assert state not in (BlockState.FREE, BlockState.CACHED), f"nobody can hold {state.value} blocks"
    assert deadline is not None or state not in TIMED_STATES, f"{state.value} blocks need a deadline"
