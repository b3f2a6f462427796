"""Lanes: calls run in order on one thread, results come back to the loop, nothing is lost at the end."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable

import pytest

from kvferry.lane import InlineLane, Lane, ThreadLane

LANES: dict[str, Callable[[], Lane]] = {
    "thread": lambda: ThreadLane("test"),
    "daemon": lambda: ThreadLane("test", daemon=True),
    "inline": InlineLane,
}


class Held:
    """A call that goes on when it may, and says that it has run."""

    def __init__(self, seen: list[str]) -> None:
        self.begun, self.end = threading.Event(), threading.Event()
        self._seen = seen

    def __call__(self) -> None:
        self.begun.set()
        assert self.end.wait(10)
        self._seen.append("running")


@pytest.fixture(params=LANES)
def lane(request: pytest.FixtureRequest) -> Lane:
    return LANES[request.param]()


async def test_calls_run_in_the_order_in_which_they_were_given(lane: Lane) -> None:
    seen: list[int] = []
    futures = [lane.run(seen.append, number) for number in range(200)]
    await asyncio.gather(*futures)
    assert seen == list(range(200))
    lane.close()


async def test_who_asks_hears_on_the_loop_that_a_call_has_begun_while_it_runs(lane: Lane) -> None:
    heard = threading.Event()
    assert await lane.run_telling(heard.set, heard.wait, 5.0)
    lane.close()


async def test_an_error_is_its_own_callers_alone(lane: Lane) -> None:
    bad, good = lane.run(int, "no number"), lane.run(int, "7")
    with pytest.raises(ValueError, match="no number"):
        await bad
    assert await good == 7
    lane.close()


async def test_after_a_drain_all_that_was_given_before_has_ended_and_been_heard(lane: Lane) -> None:
    heard: list[int] = []
    for number in range(20):
        lane.run(int, number).add_done_callback(lambda future: heard.append(future.result()))
    await lane.drain()
    assert heard == list(range(20))
    lane.close()


async def test_all_calls_of_a_lane_run_on_one_thread_which_is_not_the_loops() -> None:
    lane = ThreadLane("test")
    threads = {await lane.run(threading.get_ident) for _ in range(3)} | {await lane.run(threading.get_ident)}
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    lane.close()


async def test_results_that_wait_for_the_loop_are_told_by_one_wake() -> None:
    lane = ThreadLane("test")
    futures = [lane.run(int) for _ in range(50)]
    last = threading.Event()
    lane.run(last.set)
    assert last.wait(10)  # the loop is held here: it hears of nothing until the lane is done
    assert not any(future.done() for future in futures)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert all(future.done() for future in futures)
    lane.close()


async def test_closing_waits_for_what_runs_and_cancels_what_has_not_begun() -> None:
    lane = ThreadLane("test")
    begun, end = threading.Event(), threading.Event()

    def block() -> str:
        begun.set()
        assert end.wait(10)
        return "whole"

    running, waiting = lane.run(block), lane.run(int)
    assert begun.wait(10)
    threading.Timer(0.05, end.set).start()
    lane.close()
    assert await running == "whole"
    assert waiting.cancelled()
    with pytest.raises(RuntimeError, match="closed"):
        lane.run(int)


async def test_a_cancelled_call_does_not_begin_and_a_running_one_goes_on() -> None:
    lane = ThreadLane("test")
    seen: list[str] = []
    call = Held(seen)
    running, waiting = lane.run(call), lane.run(seen.append, "waiting")
    assert call.begun.wait(10)
    running.cancel()
    waiting.cancel()
    call.end.set()
    await lane.drain()
    assert seen == ["running"]
    lane.close()


async def test_a_call_is_taken_back_only_before_it_has_begun() -> None:
    lane = ThreadLane("test")
    seen: list[str] = []
    call = Held(seen)
    running, waiting, last = lane.run(call), lane.run(seen.append, "waiting"), lane.run(seen.append, "last")
    assert call.begun.wait(10)
    assert not lane.take_back(running)
    assert lane.take_back(waiting)
    assert not lane.take_back(waiting)
    call.end.set()
    await last
    assert not lane.take_back(last)
    assert seen == ["running", "last"]
    assert waiting.cancelled()
    assert await running is None
    lane.close()


async def test_what_is_taken_back_while_the_thread_takes_calls_has_either_run_or_not() -> None:
    lane = ThreadLane("test")
    seen: list[int] = []
    taken = []
    for number in range(3000):
        future = lane.run(seen.append, number)
        if lane.take_back(future):
            taken.append(number)
        if number % 50 == 0:
            await asyncio.sleep(0)
    await lane.drain()
    assert sorted(seen + taken) == list(range(3000))
    assert seen == sorted(seen)
    lane.close()


async def test_nobody_waits_for_what_a_daemon_runs() -> None:
    lane = ThreadLane("test", daemon=True)
    begun, end = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        end.wait()

    running, waiting = lane.run(hang), lane.run(int)
    assert begun.wait(10)
    lane.close()
    assert not running.done()
    assert waiting.cancelled()
    end.set()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts niceness by thread")
@pytest.mark.parametrize("daemon", [False, True])
async def test_only_the_lanes_own_thread_gives_way(daemon: bool) -> None:
    lane = ThreadLane("test", nice=3, daemon=daemon)
    own = os.getpriority(os.PRIO_PROCESS, 0)
    assert await lane.run(lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())) == 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == own
    lane.close()
