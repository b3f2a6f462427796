"""Rate limits: never more than the burst and what time gives, and what was not used is given back."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry_gateway.errors import ApiError
from kvferry_gateway.http.rate_limit import MINUTE, Allowance, Bucket, Charge, RateLimits, duration

# Seconds since the step before, amount to ask for or what is left of it, share of it that is used, steps until that is
# known. Few values, so that full and empty buckets and charges that overlap are common.
PAUSES = st.sampled_from((0.0, 10.0, 30.0, 60.0)) | st.floats(0, 90)
SHARES = st.sampled_from((0.0, 0.5, 1.0))
STEPS = st.lists(st.tuples(PAUSES, st.integers(1, 6), SHARES, st.integers(0, 6)), min_size=1, max_size=30)
LIMITS = st.integers(1, 6)


@dataclass
class Taken:
    at: float
    amount: int
    used: int
    charge: Charge
    settled: bool = False

    @property
    def counted(self) -> int:
        return self.used if self.settled else self.amount


def played(limit: int, steps: list[tuple[float, int, float, int]]) -> tuple[Bucket, list[Taken], float]:
    """Take whatever is to be had, and settle each charge some steps later."""
    bucket, taken, now = Bucket(limit), [], 0.0
    due: dict[int, list[Taken]] = {}
    for number, (pause, amount, share, later) in enumerate(steps):
        now += pause
        for charged in due.pop(number, []):
            bucket.settle(charged.charge, charged.used, now)
            charged.settled = True
        amount = min(amount, bucket.remaining(now))
        if amount and bucket.wait(amount, now) == 0:
            charged = Taken(now, amount, round(amount * share), bucket.charge(amount, now))
            taken.append(charged)
            due.setdefault(number + 1 + later, []).append(charged)
    return bucket, taken, now


@given(LIMITS, STEPS)
def test_no_span_of_time_holds_more_than_the_burst_and_the_rate(
    limit: int, steps: list[tuple[float, int, float, int]]
) -> None:
    _, taken, _ = played(limit, steps)
    sums = [0, *accumulate(item.counted for item in taken)]
    for first, begin in enumerate(taken):
        for last in range(first, len(taken)):
            span = taken[last].at - begin.at
            assert sums[last + 1] - sums[first] <= limit * (1 + span / MINUTE) + 1e-6


@given(LIMITS, STEPS)
def test_after_settling_the_bucket_is_as_if_no_more_had_been_taken_than_was_used(
    limit: int, steps: list[tuple[float, int, float, int]]
) -> None:
    bucket, taken, now = played(limit, steps)
    plain = Bucket(limit)
    for item in taken:
        plain.take(item.counted, item.at)
    assert bucket.missing(now) == pytest.approx(plain.missing(now), abs=1e-6)


@given(LIMITS, STEPS)
def test_after_the_wait_that_was_told_it_is_to_be_had_and_not_before(
    limit: int, steps: list[tuple[float, int, float, int]]
) -> None:
    bucket, _, now = played(limit, steps)
    for amount in (1, limit):
        wait = bucket.wait(amount, now)
        assert bucket.wait(amount, now + wait + 1e-6) == 0
        assert wait < 1e-6 or bucket.wait(amount, now + wait / 2) > 0
        assert wait < 1e-6 or bucket.remaining(now) < amount
    assert bucket.remaining(now + bucket.refilled_in(now) + 1e-6) == limit


def test_a_limit_is_a_burst_and_then_a_rate() -> None:
    bucket = Bucket(60)
    bucket.take(60, 100.0)
    assert (bucket.remaining(100.0), bucket.wait(1, 100.0), bucket.refilled_in(100.0)) == (0, 1.0, 60.0)
    assert (bucket.remaining(101.0), bucket.wait(1, 101.0), bucket.wait(60, 101.0)) == (1, 0.0, 59.0)
    assert bucket.remaining(1e6) == 60


def test_what_was_not_used_is_there_again_at_once() -> None:
    bucket = Bucket(1000)
    first, second = bucket.charge(500, 10.0), bucket.charge(500, 10.0)
    assert bucket.wait(1, 10.0) > 0
    bucket.settle(second, 100, 10.0)
    bucket.settle(first, 200, 10.0)
    assert bucket.remaining(10.0) == 700


def test_what_has_come_back_by_itself_does_not_come_back_again() -> None:
    bucket = Bucket(100)
    slow = bucket.charge(100, 0.0)
    bucket.take(100, 60.0)
    bucket.settle(slow, 0, 60.0)
    assert bucket.remaining(60.0) == 0, "the minute before would have been lost, not saved"


def test_a_refusal_is_told_as_openai_tells_it_and_costs_nothing() -> None:
    allowance = Allowance(RateLimits(requests=2, tokens=100))
    allowance.take_request(0.0)
    allowance.take_request(0.0)
    with pytest.raises(ApiError) as refused:
        allowance.take_request(0.5)
    error = refused.value
    assert (error.status, error.type, error.code, error.retry_after) == (429, "requests", "rate_limit_exceeded", 29.5)
    allowance.take_request(30.0)
    charge = allowance.charge_tokens(90, 30.0)
    with pytest.raises(ApiError) as refused:
        allowance.charge_tokens(11, 30.0)
    assert (refused.value.type, refused.value.headers) == ("tokens", [(b"retry-after", b"1")])
    with pytest.raises(ApiError, match="too large") as refused:
        allowance.charge_tokens(101, 30.0)
    assert refused.value.headers == [(b"x-should-retry", b"false")]
    assert charge is not None
    allowance.settle_tokens(charge, 40, 30.0)
    assert dict(allowance.headers(30.0)) == {
        b"x-ratelimit-limit-requests": b"2",
        b"x-ratelimit-remaining-requests": b"0",
        b"x-ratelimit-reset-requests": b"1m0s",
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"60",
        b"x-ratelimit-reset-tokens": b"24s",
    }


def test_without_a_limit_nothing_is_counted_or_told() -> None:
    free = Allowance(RateLimits())
    free.take_request(0.0)
    assert free.charge_tokens(1 << 40, 0.0) is None
    assert free.headers(0.0) == []


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0s"), (0.0001, "1ms"), (0.017, "17ms"), (1.25, "1.25s"), (59.9995, "1m0s"), (60, "1m0s"), (83.4, "1m23.4s")],
)
def test_durations_are_written_as_openai_writes_them(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
