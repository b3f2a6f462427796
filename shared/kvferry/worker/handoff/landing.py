"""One pull's way from posted receives into the sequence's blocks.

    slot ──> posted ──frame──> copy lane: check, scatter ──> good ──> posted again, with a new credit
                │                        └─ bad: asked for again ──> posted again
                └── connection lost, or the pull was over ──> free

The stages of different frames overlap: a frame that has come is given to the copy lane at once, and what the
lane has finished by the time that the loop hears of it is answered by one message of credits, as far as the pace
allows (`pace.py`); the rest follows with the next step. The target is pinned while a frame of it is in the lane, and
only then.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from dataclasses import dataclass

from kvferry.errors import CorruptFrame
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import now
from kvferry.schedule.step import BlockTable, KVStore
from kvferry.transport.base import Connection
from kvferry.transport.slots import Slot, SlotPool
from kvferry.wire.flow import Credit, Flow, FlowCodec
from kvferry.wire.frame import HEADER_BYTES, KIND_KV, frame_tag
from kvferry.worker.handoff.incoming import Incoming, Landed, Tiling, land
from kvferry.worker.handoff.pace import Pace
from kvferry.worker.metrics import WorkerMetrics

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Dock:
    """What all landings of a process share."""

    store: KVStore
    slots: SlotPool
    copy_lane: Lane
    metrics: WorkerMetrics
    codec: FlowCodec
    pace: Pace

    @property
    def frame_bytes(self) -> int:
        """The most KV that one slot takes."""
        return self.slots.slot_bytes - HEADER_BYTES


@dataclass(frozen=True, slots=True)
class Target:
    """Where a pull lands: some KV heads of the tokens [from_token, num_context) of one sequence."""

    pull_id: int
    from_token: int
    num_context: int
    heads: range
    block_table: BlockTable
    request_id: str  # for logs
    pin: Callable[[], None]
    unpin: Callable[[], None]


class Landing:
    """A pull from its Fetch on. Only the event loop calls it."""

    def __init__(
        self,
        dock: Dock,
        connection: Connection,
        target: Target,
        *,
        fetch: Callable[[int], Flow],
        whole: Callable[[], None],
        failed: Callable[[str], None],
    ) -> None:
        """`fetch` makes the message that asks for the first frames, so many of them; `whole` hears that all frames and
        the manifest have landed, `failed` why the pull is worth nothing."""
        self._dock = dock
        self._connection = connection
        self._target = target
        self._fetch = fetch
        self._whole = whole
        self._failed = failed
        self._label = f"pull {target.pull_id}"
        self._tiling = Tiling(dock.store.kv_format, target.heads, target.from_token, target.num_context)
        self.incoming = Incoming(target.pull_id, target.from_token, self._tiling.missing_bytes)
        self.heard = now()  # last frame
        self._posted: dict[int, Slot] = {}  # frame -> slot that the transport holds
        self._emptied: list[Slot] = []  # of good frames, to be posted again
        self._asking = False  # for more, soon
        self.held_back = False  # at some time, by the pace

    async def start(self) -> None:
        """Post the first receives and ask for their frames, as soon as there is a slot."""
        slots = [await self._dock.slots.acquire(self._label)]
        self.heard = now()
        # The first may always come: a pull that asks for nothing would hear nothing either.
        self._top_up(slots, 1 + self._allowed(max(0, self._num_wanted - 1), 1))
        if self._connection.closed or self.incoming.over:
            self._release(slots)
            return
        self._post(slots)
        self._connection.send_message(self._dock.codec.encode(self._fetch(len(slots))))

    def finish(self) -> None:
        """No more frames are wanted. Posted slots come back by themselves, when P's pads or the end complete them."""
        self.incoming.over = True
        slots = [*self._posted.values(), *self._emptied]
        self._posted.clear()
        self._emptied.clear()
        self._release(slots)

    @property
    def waits_for_slot(self) -> bool:
        return self.incoming.num_posted == 0

    # -- receives --------------------------------------------------------------------------------------------

    def _post(self, slots: list[Slot]) -> None:
        for slot in slots:
            frame = self.incoming.post()
            future = self._connection.receive(frame_tag(self.incoming.pull_id, frame), slot.view)
            self._dock.slots.lend(slot, future)
            self._posted[frame] = slot
            future.add_done_callback(functools.partial(self._received, frame))

    def _received(self, frame: int, future: asyncio.Future[int]) -> None:
        slot = self._posted.pop(frame, None)
        if slot is None:
            return  # the pull was over: the slot has been let go
        error = future.exception()
        if error is None:
            self._land(slot, frame, future.result())
        elif isinstance(error, CorruptFrame):
            self._bad(slot, frame, error)
        else:
            self._dock.slots.release(slot)  # the puller hears of the connection's end by itself

    def _land(self, slot: Slot, frame: int, received: int) -> None:
        self._target.pin()
        landing = self._dock.copy_lane.run(
            land,
            self._dock.store,
            self._tiling,
            self._target.block_table,
            slot.view,
            received,
            self.incoming.pull_id,
            frame,
        )
        landing.add_done_callback(functools.partial(self._landed, slot, frame))

    # -- what the copy lane says -----------------------------------------------------------------------------

    def _landed(self, slot: Slot, frame: int, landing: asyncio.Future[Landed]) -> None:
        self._target.unpin()
        if landing.cancelled():  # the lane was closed
            self._dock.slots.release(slot)
            return
        error = landing.exception()
        if error is None:
            self._good(slot, landing.result())
        elif isinstance(error, CorruptFrame):
            self._bad(slot, frame, error)
        else:
            self._broken(slot, error)

    def _good(self, slot: Slot, landed: Landed) -> None:
        self._count(landed)
        self.heard = now()
        self.incoming.good(landed)
        if landed.header.kind == KIND_KV and not self.incoming.over:
            self._emptied.append(slot)
            if not self._asking:
                self._asking = True
                asyncio.get_running_loop().call_soon(self._ask_after_landing)
        else:
            self._dock.slots.release(slot)
        if self.incoming.whole and not self.incoming.over:
            self._whole()

    def _ask_after_landing(self) -> None:
        self._asking = False
        self.ask_for_more()

    def ask_for_more(self) -> None:
        """Post the slots of all frames that have landed by now, and more where fewer than the window are posted;
        towards the end, or where the pace forbids, fewer."""
        if self.incoming.num_posted == 0:
            return  # the Fetch goes first
        slots, self._emptied = self._emptied, []
        self._top_up(slots, self._allowed(self._num_wanted, len(self._posted)))
        if not slots:
            return
        self._post(slots)
        credit = Credit(self.incoming.pull_id, len(slots))
        self._connection.send_message(self._dock.codec.encode(credit))

    def _bad(self, slot: Slot, frame: int, error: CorruptFrame) -> None:
        self._dock.metrics.transfer_failures.labels(error.reason).inc()
        log.warning("bad KV frame", reason=error.reason, request_id=self._target.request_id, frame=frame)
        if self.incoming.over:
            self._dock.slots.release(slot)
        elif self.incoming.bad():
            self._post([slot])
            credit = Credit(self.incoming.pull_id, 1, (frame,))
            self._connection.send_message(self._dock.codec.encode(credit))
        else:
            self._dock.slots.release(slot)
            self._failed(error.reason)

    def _broken(self, slot: Slot, error: BaseException) -> None:
        """The runner could not scatter a good frame: a fault of this side, which costs the pull."""
        log.error("cannot scatter KV", request_id=self._target.request_id, exc_info=error)
        self._dock.metrics.transfer_failures.labels("scatter").inc()
        self._dock.slots.release(slot)
        if not self.incoming.over:
            self._failed(type(error).__name__)

    # -- slots -----------------------------------------------------------------------------------------------

    @property
    def _num_wanted(self) -> int:
        return self.incoming.num_wanted(len(self._posted), self._dock.frame_bytes)

    def _allowed(self, wanted: int, num_open: int) -> int:
        allowed = self._dock.pace.take(wanted, num_open, self.incoming.missing_bytes)
        self.held_back |= allowed < wanted
        return allowed

    def _top_up(self, slots: list[Slot], wanted: int) -> None:
        """Make `slots` so many, as far as there are any."""
        while len(slots) < wanted and (slot := self._dock.slots.try_acquire(self._label)) is not None:
            slots.append(slot)
        while len(slots) > wanted:
            self._dock.slots.release(slots.pop())

    def _release(self, slots: list[Slot]) -> None:
        for slot in slots:
            self._dock.slots.release(slot)

    def _count(self, landed: Landed) -> None:
        header = landed.header
        if header.kind == KIND_KV:
            self._dock.metrics.kv_bytes.labels("received").inc(header.payload_bytes)
            if header.piece.layer_start == header.piece.head_start == 0:
                self._dock.metrics.kv_tokens.labels("received").inc(header.piece.num_tokens)
