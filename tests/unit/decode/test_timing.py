"""Memory is reserved neither too early nor too late."""

from __future__ import annotations

import pytest

from kvferry.wire.flow import Progress
from kvferry_decode.timing import FIRST_GUESS_BYTES_PER_S, MIN_BYTES, TransferRate, is_due


@pytest.mark.parametrize(
    ("holds", "expected_s", "due"),
    [(True, 0.0, True), (True, 0.89, True), (True, 0.91, False), (False, 0.0, False), (False, 0.9, False)],
)
def test_a_pull_is_due_once_p_holds_memory_and_the_transfer_could_just_end_in_time(
    holds: bool, expected_s: float, due: bool
) -> None:
    assert is_due(Progress(1, holds, 0, 100, expected_s), transfer_s=0.2, lead_s=0.7) == due


def test_only_large_and_faster_pulls_raise_the_rate() -> None:
    rate = TransferRate()
    rate.observe(MIN_BYTES - 1, 1e-9)
    rate.observe(MIN_BYTES, 100.0)
    rate.observe(MIN_BYTES, 0.0)
    assert rate.bytes_per_s == FIRST_GUESS_BYTES_PER_S
    rate.observe(MIN_BYTES * 1000, MIN_BYTES * 1000 / (2 * FIRST_GUESS_BYTES_PER_S))
    assert FIRST_GUESS_BYTES_PER_S < rate.bytes_per_s < 2 * FIRST_GUESS_BYTES_PER_S
    assert rate.seconds(int(rate.bytes_per_s)) == pytest.approx(1.0)
