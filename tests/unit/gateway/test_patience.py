"""How long a request waits for a place, by what refused it."""

from __future__ import annotations

import math

import pytest

from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry.wire.work import Rejected
from kvferry_gateway.errors import ApiError, failures_used_up, no_worker, numerics_gone, too_many_requests
from kvferry_gateway.fleet.mail import Unreachable
from kvferry_gateway.flights.offer import Refusals
from kvferry_gateway.flights.patience import (
    NEW_REQUEST_WAIT,
    RECENT_ABSENCE,
    begun_request_wait,
    new_request_wait,
)

GONE = no_worker("nobody")
FULL = too_many_requests("full", 1.0)
FAILED = failures_used_up(3, "wedged")
OTHERS = numerics_gone("n")
RECORD = WorkerRecord("decode", "w", 5, 1, "s", "m", "tcp", WorkerAddress(5, ("a",)), "f", "n", 500, 16, 20, 1)


@pytest.mark.parametrize(
    ("error", "may_return", "absent_s", "seconds"),
    [
        (GONE, True, 0.0, NEW_REQUEST_WAIT),
        (GONE, True, RECENT_ABSENCE, NEW_REQUEST_WAIT),
        (OTHERS, True, 1.0, NEW_REQUEST_WAIT),
        (GONE, True, RECENT_ABSENCE + 0.01, 0.0),
        (GONE, True, math.inf, 0.0),
        (GONE, False, 0.0, 0.0),
        (FULL, True, 0.0, 0.0),
        (FAILED, True, 0.0, 0.0),
        (ApiError(400, "too long"), True, 0.0, 0.0),
    ],
)
def test_a_new_request_waits_for_who_was_there_a_moment_ago_and_may_return(
    error: ApiError, may_return: bool, absent_s: float, seconds: float
) -> None:
    assert new_request_wait(error, may_return=may_return, absent_s=absent_s) == seconds


@pytest.mark.parametrize(("error", "seconds"), [(GONE, 60.0), (OTHERS, 60.0), (FULL, 60.0), (FAILED, 0.0)])
def test_a_request_that_has_begun_waits_for_capacity_too(error: ApiError, seconds: float) -> None:
    assert begun_request_wait(error, 60.0) == seconds


@pytest.mark.parametrize(
    ("reply", "passing"),
    [
        (Unreachable(), True),
        (Unreachable(bus_down=True), True),
        (Unreachable(unsendable=True), False),
        (Rejected(b"t" * 16, 1, "draining"), True),
        (Rejected(b"t" * 16, 1, "not_ready"), True),
        (Rejected(b"t" * 16, 1, "wrong_model"), False),
        (Rejected(b"t" * 16, 1, "queue_full"), False),
    ],
)
def test_who_is_away_may_be_back_in_a_moment_and_who_is_unwilling_is_not(
    reply: Rejected | Unreachable, passing: bool
) -> None:
    refusals = Refusals({})
    refusals.note(RECORD, reply)
    assert refusals.passing == passing
