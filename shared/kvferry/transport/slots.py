"""Staging slots: the only memory that the transport ever touches.

    free ── acquire ──> packing ── lend(future) ──> lent ── release ──> draining ── completion ──> free
                           └────────── release ──────────────────────────────────────────────────> free
                                                                   draining ── 5 s ──> retired ──> free

A slot returns to the pool only when its transfer has completed, so that a late write can never reach a
slot that has a new owner. A slot whose owner has let go and whose transfer does not complete within
`RETIRE_SECONDS` is retired and counted; it comes back if the completion does come.
"""

from __future__ import annotations

import asyncio
import mmap
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Final, Literal

from kvferry.runtime import mapped_memory
from kvferry.wire.frame import HEADER_BYTES

DEFAULT_PAYLOAD_BYTES: Final = 4 << 20
RETIRE_SECONDS: Final = 5.0

SlotState = Literal["free", "packing", "lent", "draining", "retired"]


class Slot:
    """`view` is page-aligned memory of header + payload bytes, the owner's while it is packing."""

    __slots__ = ("deadline", "index", "label", "state", "timer", "transfer", "view")

    def __init__(self, index: int, view: memoryview) -> None:
        self.index = index
        self.view = view
        self.state: SlotState = "free"
        self.label = ""  # who holds it, for the ledger
        self.deadline: float | None = None  # loop time by which a draining slot must be free
        self.transfer: asyncio.Future[Any] | None = None
        self.timer: asyncio.TimerHandle | None = None


@dataclass(frozen=True, slots=True)
class SlotRecord:
    """One line of the ledger."""

    index: int
    state: SlotState
    label: str
    deadline: float | None  # seconds of the loop's clock


class SlotPool:
    """A fixed number of slots. All methods run on one event loop."""

    def __init__(self, num_slots: int, payload_bytes: int = DEFAULT_PAYLOAD_BYTES) -> None:
        if num_slots < 1 or payload_bytes < 1:
            raise ValueError(f"{num_slots} slots of {payload_bytes} bytes")
        self.slot_bytes: Final = HEADER_BYTES + payload_bytes
        self.num_retirements = 0
        stride = -(-self.slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mapped_memory(num_slots * stride)
        whole = memoryview(self._memory)
        self._slots = [Slot(i, whole[i * stride : i * stride + self.slot_bytes]) for i in range(num_slots)]
        self._free = list(self._slots)
        self._waiters: deque[tuple[asyncio.Future[Slot], str]] = deque()

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def try_acquire(self, label: str) -> Slot | None:
        """A slot at once, or None where none is free or somebody waits already."""
        if not self._free or self._waiters:
            return None
        return self._hand_out(label)

    async def acquire(self, label: str) -> Slot:
        """A slot, in the order of asking."""
        if (slot := self.try_acquire(label)) is not None:
            return slot
        waiter: asyncio.Future[Slot] = asyncio.get_running_loop().create_future()
        self._waiters.append((waiter, label))
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self.release(waiter.result())
            else:
                self._waiters = deque(entry for entry in self._waiters if entry[0] is not waiter)
            raise

    def lend(self, slot: Slot, transfer: asyncio.Future[Any]) -> None:
        """The transport holds the slot until `transfer` is done; then its owner may read it, or lend it again."""
        assert slot.state == "packing", slot.state
        slot.state = "lent"
        slot.transfer = transfer
        transfer.add_done_callback(lambda _: self._completed(slot))

    def release(self, slot: Slot) -> None:
        """The owner lets go. The slot is free as soon as the transport has let go, too."""
        if slot.state == "packing":
            self._make_free(slot)
            return
        assert slot.state == "lent", slot.state
        if slot.transfer is not None and slot.transfer.done():
            slot.transfer = None  # its callback has yet to run, and finds the slot gone on
            self._make_free(slot)
            return
        loop = asyncio.get_running_loop()
        slot.state = "draining"
        slot.deadline = loop.time() + RETIRE_SECONDS
        slot.timer = loop.call_later(RETIRE_SECONDS, self._retire, slot)

    def snapshot(self) -> tuple[SlotRecord, ...]:
        """Every slot's state, for the block ledger and `/debug/blocks`."""
        return tuple(SlotRecord(slot.index, slot.state, slot.label, slot.deadline) for slot in self._slots)

    def counts(self) -> dict[SlotState, int]:
        """Slots in each state that some are in."""
        return dict(Counter(slot.state for slot in self._slots))

    def check_integrity(self) -> None:
        """Raises AssertionError if the books do not add up."""
        free = [slot.index for slot in self._free]
        assert len(free) == len(set(free)), "a slot is free twice"
        assert set(free) == {slot.index for slot in self._slots if slot.state == "free"}, "free list and states differ"
        for slot in self._slots:
            held = slot.state in ("lent", "draining", "retired")
            assert held == (slot.transfer is not None), f"slot {slot.index} is {slot.state} with a wrong transfer"
            assert (slot.state == "draining") == (slot.timer is not None), f"slot {slot.index}: timer"
            assert (slot.label == "") == (slot.state == "free"), f"slot {slot.index}: label"
        assert not (self._free and any(not waiter.done() for waiter, _ in self._waiters)), "free slots, yet some wait"

    def close(self) -> None:
        """Give the memory back. Only once no transfer is under way."""
        assert all(slot.transfer is None for slot in self._slots), "the transport still holds slots"
        for slot in self._slots:
            slot.view.release()

    def _hand_out(self, label: str) -> Slot:
        slot = self._free.pop()  # the one used last: its memory is still in the caches
        slot.state = "packing"
        slot.label = label or "?"
        return slot

    def _make_free(self, slot: Slot) -> None:
        if slot.timer is not None:
            slot.timer.cancel()
        slot.state, slot.label, slot.deadline, slot.timer = "free", "", None, None
        self._free.append(slot)
        while self._waiters and self._free:
            waiter, label = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(self._hand_out(label))

    def _completed(self, slot: Slot) -> None:
        if slot.transfer is None or not slot.transfer.done():
            return  # freed meanwhile, and perhaps lent again
        slot.transfer = None
        if slot.state == "lent":
            slot.state = "packing"
        else:
            self._make_free(slot)

    def _retire(self, slot: Slot) -> None:
        slot.state, slot.timer, slot.deadline = "retired", None, None
        self.num_retirements += 1
