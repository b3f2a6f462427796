"""Memory is reserved neither too early nor too late."""

from __future__ import annotations

import pytest

from kvferry.wire.flow import Progress
from kvferry.worker.handoff.timing import FIRST_GUESS_BYTES_PER_S, MIN_BYTES, TransferRate, is_due


@pytest.mark.parametrize(
    ("holds", "expected_s", "due"),
    [(True, 0.0, True), (True, 0.89, True), (True, 0.91, False), (False, 0.0, False), (False, 0.9, False)],
)
def test_a_pull_is_due_once_p_holds_memory_and_the_transfer_could_just_end_in_time(
    holds: bool, expected_s: float, due: bool
) -> None:
    assert is_due(Progress(1, holds, 0, 100, expected_s), transfer_s=0.2, lead_s=0.7) == due


GUESS = FIRST_GUESS_BYTES_PER_S
PULL = 64 << 20  # bytes


def learned(*pulls: tuple[int, float]) -> TransferRate:
    """`pulls`: bytes and bytes/s, none of them beside a prefill."""
    rate = TransferRate()
    for num_bytes, bytes_per_s in pulls:
        rate.observe(num_bytes, num_bytes / bytes_per_s)
    return rate


def test_before_a_pull_the_rate_is_a_guess() -> None:
    assert TransferRate().bytes_per_s == pytest.approx(GUESS)
    assert TransferRate().seconds(int(GUESS)) == pytest.approx(1.0)


@pytest.mark.parametrize("factor", [0.1, 0.5, 2.0, 10.0])
def test_the_rate_follows_in_either_direction_and_gets_there(factor: float) -> None:
    rates = [learned(*[(PULL, factor * GUESS)] * count).bytes_per_s for count in range(60)]
    distances = [abs(rate - factor * GUESS) for rate in rates]
    assert distances == sorted(distances, reverse=True), "each pull brings it nearer"
    assert min(GUESS, factor * GUESS) < rates[1] < max(GUESS, factor * GUESS), "one does not decide"
    assert rates[-1] == pytest.approx(factor * GUESS, rel=0.02)


def test_large_pulls_count_for_more_than_small_ones() -> None:
    whole = learned((PULL, 4 * GUESS)).bytes_per_s
    assert whole > learned((2 * MIN_BYTES, 4 * GUESS)).bytes_per_s > GUESS
    assert learned(*[(PULL // 8, 4 * GUESS)] * 8).bytes_per_s == pytest.approx(whole, rel=0.1), "however it is cut"


def test_what_is_small_or_took_no_time_tells_nothing() -> None:
    rate = TransferRate()
    rate.observe(MIN_BYTES - 1, 100.0)
    rate.observe(MIN_BYTES, 0.0)
    assert rate.bytes_per_s == pytest.approx(GUESS)


def test_a_pull_beside_its_prefill_tells_the_rate_only_where_it_waited_for_the_transfer() -> None:
    slow_s, fast_s = 4 * PULL / GUESS, PULL / GUESS / 2
    rate = TransferRate()
    rate.observe(PULL, slow_s, prefill_s=0.9 * slow_s)
    assert rate.bytes_per_s == pytest.approx(GUESS), "it waited for the prefill"
    rate.observe(PULL, slow_s, prefill_s=0.4 * slow_s)
    assert rate.bytes_per_s == learned((PULL, GUESS / 4)).bytes_per_s
    lower = rate.bytes_per_s
    rate.observe(PULL, fast_s, prefill_s=fast_s)
    assert rate.bytes_per_s > lower, "faster than thought: it counts in any case"
