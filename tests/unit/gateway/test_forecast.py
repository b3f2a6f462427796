"""What happened teaches the forecasts how wrong they are, each figure once."""

from __future__ import annotations

import math

import pytest

from kvferry_gateway.placement.decision import Reason
from kvferry_gateway.placement.estimates import ForecastError
from kvferry_gateway.placement.forecast import MIN_TOKENS, Forecast

REASON = Reason("least_work", ttft_s=0.5, queue_s=0.0, prefill_s=0.4, transfer_s=0.1, itl_s=0.01, chance=1.0,
                cached_tokens=0, num_considered=1)  # fmt: skip


def forecast() -> Forecast:
    return Forecast(REASON, 10.0, ForecastError(0.5), ForecastError(0.2))


def test_the_first_token_teaches_the_ttft_and_later_ones_do_not() -> None:
    made = forecast()
    made.began(11.0)
    made.began(99.0)
    assert made.ttft_error.bias == pytest.approx(math.log(2.0)), "it took 1 s instead of 0.5"


def test_the_end_teaches_the_mean_itl() -> None:
    made = forecast()
    made.began(11.0)
    made.ended(11, 11.3)
    assert made.itl_error.bias == pytest.approx(math.log(3.0)), "10 gaps of 30 ms instead of 10"


def test_an_attempt_of_few_tokens_or_of_none_tells_no_itl() -> None:
    made = forecast()
    made.ended(100, 50.0)
    made.began(11.0)
    made.ended(MIN_TOKENS - 1, 50.0)
    assert made.itl_error.bias == 0.0
