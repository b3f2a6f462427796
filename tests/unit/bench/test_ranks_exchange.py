"""What the benchmark of ranks times is a whole exchange: each rank has what all have written."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from bench.ranks_exchange import Ranks
from runners import native_library

SIZE = 3
WIDTH = 96


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    ranks = Ranks(native_library(), SIZE)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("rows", [1, 5])
def test_every_rank_reads_the_columns_of_all(ranks: Ranks, rows: int) -> None:
    expected = np.repeat(np.arange(1, SIZE + 1, dtype=np.uint8), WIDTH * 2 // SIZE)  # bytes of bf16
    found = ranks.content(rows, WIDTH)
    assert len(found) == SIZE
    for whole in found:
        assert np.array_equal(whole, np.tile(expected, (rows, 1)))


def test_a_rank_that_waits_for_others_takes_longer_than_its_copies(ranks: Ranks) -> None:
    taken = ranks.exchange(1, WIDTH)
    assert 0 < taken.alone < taken.together
    assert ranks.barrier() > 0
