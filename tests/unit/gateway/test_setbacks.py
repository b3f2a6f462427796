"""How often a request is placed again, and when it is given up."""

from __future__ import annotations

import pytest

from kvferry_gateway.errors import ApiError
from kvferry_gateway.flights.setbacks import CRASHES_TO_ISOLATE, Setbacks
from kvferry_gateway.streams.attempt import HARMLESS_ENDS, Lost


def test_what_is_nobodys_fault_may_happen_for_ever() -> None:
    setbacks = Setbacks(1, 60.0)
    for _ in range(100):
        for reason in HARMLESS_ENDS:
            setbacks.count(Lost(reason), None)
    assert not setbacks.alone


def test_failures_are_counted_to_the_budget() -> None:
    setbacks = Setbacks(3, 60.0)
    setbacks.count(Lost("decode_gone"), None)
    setbacks.count(Lost("transfer_failed"), 7)
    with pytest.raises(ApiError, match="failed 3 times on its workers, last: wedged") as caught:
        setbacks.count(Lost("wedged"), None)
    assert (caught.value.status, caught.value.code) == (503, "worker_failed")


def test_who_crashes_workers_runs_alone_and_is_given_up_when_one_more_crashes() -> None:
    setbacks = Setbacks(10, 60.0)
    for crashes in range(CRASHES_TO_ISOLATE):
        assert setbacks.alone == (crashes >= CRASHES_TO_ISOLATE)
        setbacks.count(Lost("decode_gone", crashed=True), None)
    assert setbacks.alone
    setbacks.count(Lost("decode_gone"), None)  # killed from outside: no proof
    with pytest.raises(ApiError, match="failed 4 times"):
        setbacks.count(Lost("decode_gone", crashed=True), None)


def test_a_prefill_worker_whose_connection_broke_is_not_asked_again() -> None:
    setbacks = Setbacks(10, 60.0)
    setbacks.count(Lost("prefill_lost"), 7)
    setbacks.count(Lost("prefill_lost"), None)
    setbacks.count(Lost("prefill_gone"), 8)
    assert setbacks.lost_prefills == {7}


def test_a_deadline_and_a_grammar_end_it_at_once() -> None:
    setbacks = Setbacks(10, 60.0)
    with pytest.raises(ApiError, match="60"):
        setbacks.count(Lost("deadline"), None)
    with pytest.raises(ApiError, match="no such rule"):
        setbacks.count(Lost("grammar", detail="no such rule"), None)
