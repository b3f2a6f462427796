"""The slot pool: who holds a slot, and when it may be held by another."""

from __future__ import annotations

import asyncio
import ctypes
import mmap
from collections import Counter

import pytest
from virtual_loop import VirtualLoop

from kvferry.transport.slots import DEFAULT_PAYLOAD_BYTES, RETIRE_SECONDS, Slot, SlotPool
from kvferry.wire.frame import HEADER_BYTES


def states(pool: SlotPool) -> Counter[str]:
    pool.check_integrity()
    return Counter(record.state for record in pool.snapshot())


def take(pool: SlotPool, label: str = "test") -> Slot:
    slot = pool.try_acquire(label)
    assert slot is not None
    return slot


def a_transfer() -> asyncio.Future[None]:
    return asyncio.get_running_loop().create_future()


async def turn() -> None:
    """Let the callbacks of futures run."""
    await asyncio.sleep(0)
    await asyncio.sleep(0)


async def test_slots_are_page_aligned_apart_and_large_enough() -> None:
    pool = SlotPool(3, 100_000)
    spans = []
    for _ in range(3):
        slot = take(pool)
        assert len(slot.view) == pool.slot_bytes == HEADER_BYTES + 100_000
        start = ctypes.addressof(ctypes.c_char.from_buffer(slot.view))
        assert start % mmap.PAGESIZE == 0
        spans.append((start, start + len(slot.view)))
        slot.view[:] = bytes([slot.index + 1]) * len(slot.view)
    assert all(end <= start for (_, end), (start, _) in zip(sorted(spans), sorted(spans)[1:], strict=False))
    assert pool.try_acquire("one more") is None
    assert SlotPool(1).slot_bytes == HEADER_BYTES + DEFAULT_PAYLOAD_BYTES


async def test_a_lent_slot_is_free_only_after_release_and_completion() -> None:
    pool = SlotPool(1, 100)
    for release_first in (True, False):
        slot, transfer = take(pool), a_transfer()
        pool.lend(slot, transfer)
        assert states(pool) == {"lent": 1}
        if release_first:
            pool.release(slot)
            assert states(pool) == {"draining": 1}
            assert pool.try_acquire("early") is None
            transfer.set_result(None)
            await turn()
        else:
            transfer.set_result(None)
            await turn()
            assert states(pool) == {"packing": 1}
            pool.release(slot)
        assert states(pool) == {"free": 1}
    assert pool.num_retirements == 0


async def test_a_failed_transfer_frees_its_slot_as_well() -> None:
    pool = SlotPool(1, 100)
    slot, transfer = take(pool), a_transfer()
    pool.lend(slot, transfer)
    pool.release(slot)
    transfer.set_exception(ConnectionError())
    transfer.exception()
    await turn()
    assert states(pool) == {"free": 1}


async def test_a_stale_completion_does_not_touch_the_next_owner() -> None:
    pool = SlotPool(1, 100)
    slot, transfer = take(pool), a_transfer()
    pool.lend(slot, transfer)
    transfer.set_result(None)
    pool.release(slot)  # before the callback of the completion has run
    again = take(pool)
    pool.lend(again, a_transfer())
    await turn()
    assert states(pool) == {"lent": 1}


async def test_waiters_are_served_in_order_and_nobody_overtakes() -> None:
    pool = SlotPool(1, 100)
    held = take(pool)
    order: list[int] = []

    async def wait(number: int) -> None:
        slot = await pool.acquire(f"waiter {number}")
        order.append(number)
        assert pool.try_acquire("overtaker") is None
        pool.release(slot)

    tasks = [asyncio.create_task(wait(number)) for number in range(4)]
    await turn()
    tasks[1].cancel()
    pool.release(held)
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 2, 3]
    assert states(pool) == {"free": 1}


async def test_a_waiter_cancelled_in_the_moment_of_its_turn_gives_the_slot_on() -> None:
    pool = SlotPool(1, 100)
    held = take(pool)
    first, second = (asyncio.create_task(pool.acquire("waiter")) for _ in range(2))
    await turn()
    pool.release(held)
    first.cancel()
    pool.release(await second)
    assert first.cancelled()
    assert states(pool) == {"free": 1}


def test_a_slot_without_completion_is_retired_after_five_seconds_and_comes_back_with_it() -> None:
    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        pool = SlotPool(2, 100)
        late, prompt = take(pool), take(pool)
        transfers = [a_transfer(), a_transfer()]
        for slot, transfer in zip((late, prompt), transfers, strict=True):
            pool.lend(slot, transfer)
        await asyncio.sleep(100)  # a receive may be posted for long: the clock runs from its release
        assert states(pool) == {"lent": 2}
        pool.release(late)
        pool.release(prompt)
        assert pool.snapshot()[late.index].deadline == loop.time() + RETIRE_SECONDS
        await asyncio.sleep(RETIRE_SECONDS - 0.01)
        transfers[1].set_result(None)
        await asyncio.sleep(0.02)
        assert states(pool) == {"retired": 1, "free": 1}
        assert pool.num_retirements == 1
        transfers[0].set_result(None)
        await turn()
        assert states(pool) == {"free": 2}
        assert pool.num_retirements == 1

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(scenario())


async def test_the_ledger_names_the_holder() -> None:
    pool = SlotPool(2, 100)
    slot = take(pool, "pull 7")
    assert sorted(record.label for record in pool.snapshot()) == ["", "pull 7"]
    pool.release(slot)


@pytest.mark.parametrize("fault", ["free twice", "lost", "wrong state"])
async def test_integrity_finds_planted_faults(fault: str) -> None:
    pool = SlotPool(2, 100)
    slot = take(pool)
    if fault == "free twice":
        pool.release(slot)
        pool._free.append(slot)
    elif fault == "lost":
        slot.state = "free"
        slot.label = ""
    else:
        slot.state = "lent"
    with pytest.raises(AssertionError):
        pool.check_integrity()


async def test_a_pool_in_use_cannot_be_closed() -> None:
    pool = SlotPool(1, 100)
    slot, transfer = take(pool), a_transfer()
    pool.lend(slot, transfer)
    with pytest.raises(AssertionError):
        pool.close()
    transfer.set_result(None)
    await turn()
    pool.close()
