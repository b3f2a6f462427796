"""What must hold at every step: books, fencing, memory rules, deadlines. A violation ends the run at once.

Looked at after every engine step of a worker, and at the very moment for what has one (a reservation, a preemption,
an attempt's beginning).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from processes import acting_as

from kvferry.kv.ledger import BlockState
from kvferry.runtime import now
from kvferry.schedule.sequence import Dropped, Key, Sequence
from kvferry.transport.slots import Slot, SlotPool
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import Fence
from kvferry.worker.worker import Worker
from kvferry_gateway.streams.attempt import Attempt

if TYPE_CHECKING:
    from gateways import SimulatedGateway
    from world import World

# `expire` looks at every heartbeat; what a step or a copy still uses is left for that long, a slow disk's included.
OVERDUE_S = 0.75
DEAD_GATEWAY_S = 2.5  # its last heartbeat, its silence, the worker's own tick, a step
HANG_S = 1e6
RECONNECT_S = 1.5  # to be back on the bus, and for others to be
AWAKE_S = 1.0  # after a freeze


class Violation(AssertionError):
    """A rule is broken."""


def must(holds: object, *what: object) -> None:
    if not holds:
        raise Violation(" ".join(map(str, what)))


class CheckedSlots(SlotPool):
    """Staging slots, with books of their own on what the transport holds."""

    def __init__(self, num_slots: int, payload_bytes: int, referee: Referee) -> None:
        super().__init__(num_slots, payload_bytes)
        self._referee = referee
        self._outstanding: dict[asyncio.Future[Any], Slot] = {}

    def lend(self, slot: Slot, transfer: asyncio.Future[Any]) -> None:
        super().lend(slot, transfer)
        self._outstanding[transfer] = slot

    def _hand_out(self, label: str) -> Slot:
        self._referee.guard(self.check_transfers)
        return super()._hand_out(label)

    def check_transfers(self) -> None:
        """A slot that the transport still holds is nobody else's."""
        for transfer, slot in list(self._outstanding.items()):
            if transfer.done():
                del self._outstanding[transfer]
            else:
                lent = slot.state in ("lent", "draining", "retired") and slot.transfer is transfer
                must(lent, "slot", slot.index, "is", slot.state, "for", slot.label, "under a transfer of another")


class Referee:
    """Watches all workers and gateways of one world."""

    def __init__(self, world: World) -> None:
        self.num_steps = 0
        self.violation: Violation | None = None
        self.thawed: dict[str, float] = {}  # process -> true time
        self._world = world
        self._watched: dict[str, WatchedWorker] = {}
        self._died: dict[int, float] = {}  # gateway's incarnation -> true time
        self._bus_trouble = 0.0  # true time of the last
        world.broker.on_fence = self._fence_came
        self._prefill_held: dict[Key, None] = {}  # attempts for which a prefill worker has taken memory
        self._codecs = Codecs()
        self._begun_with: dict[tuple[int, int], int] = {}  # (gateway, stream) -> tokens that the gateway had

    # -- whom it watches -------------------------------------------------------------------------------------

    def watch(self, worker: Worker[Any]) -> None:
        watched = WatchedWorker(self, worker)
        worker.stepped = self._after(worker.stepped, watched.check, counts=True)  # type: ignore[method-assign]
        worker.tick = self._after(worker.tick, watched.check)  # type: ignore[method-assign]
        worker.drop = self._after(worker.drop, watched.dropped)  # type: ignore[method-assign]
        memory = worker.scheduler.memory
        reserve = memory.reserve

        def reserving(sequence: Sequence, *args: Any, **kwargs: Any) -> bool:
            reserved = reserve(sequence, *args, **kwargs)
            if reserved:
                self.guard(watched.reserved, sequence)
            return reserved

        memory.reserve = reserving  # type: ignore[method-assign]
        self._watched[worker.settings.name] = watched

    def watch_gateway(self, gateway: SimulatedGateway) -> None:
        fleet = gateway.fleet
        add = fleet.table.add

        def adding(attempt: Attempt) -> None:
            self._begun_with[fleet.incarnation, attempt.stream_id] = len(attempt.stream.tokens)
            add(attempt)

        fleet.table.add = adding  # type: ignore[method-assign]

    def _fence_came(self, process: str | None, payload: bytes) -> None:
        message = self._codecs.to_worker.decode(payload)
        watched = self._watched.get(process or "")
        if isinstance(message, Fence) and watched is not None and watched.incarnation == message.worker_incarnation:
            watched.fenced(message.gateway_incarnation, message.highest_attempt)

    def gateway_died(self, gateway: SimulatedGateway) -> None:
        self._died[gateway.fleet.incarnation] = self._world.true_time

    def note_bus_trouble(self) -> None:
        """Who cannot hear does not judge."""
        self._bus_trouble = self._world.true_time

    def dead_for(self, gateway_incarnation: int, worker: Worker[Any]) -> float:
        """Seconds in which a worker could have noticed a gateway's death."""
        died, broker, name = self._died.get(gateway_incarnation), self._world.broker, worker.settings.name
        if died is None or name in broker.deaf or not worker.bus.connected or self.may_be_late(name):
            return 0.0
        trouble = max(self._bus_trouble + RECONNECT_S, self.thawed.get(name, 0.0))
        return self._world.true_time - max(died, trouble)

    def _after(self, call: Callable[..., Any], check: Callable[..., None], counts: bool = False) -> Callable[..., Any]:
        def checked(*args: Any) -> Any:
            result = call(*args)
            self.num_steps += counts
            self.guard(check, *args)
            return result

        return checked

    def guard(self, check: Callable[..., None], *args: Any) -> None:
        """A violation must reach the test, not the worker's own error handling."""
        if self.violation is not None:
            return
        try:
            check(*args)
        except AssertionError as error:
            self.violation = Violation(f"at {now():.3f}: {error}")
            self.violation.__cause__ = error
            with acting_as(None):
                self._world.changed()

    # -- what it knows of the whole --------------------------------------------------------------------------

    def took_memory(self, key: Key) -> None:
        self._prefill_held[key] = None

    def prefill_has_held(self, key: Key) -> bool:
        return key in self._prefill_held

    def tokens_at_begin(self, gateway_incarnation: int, stream_id: int) -> int | None:
        return self._begun_with.get((gateway_incarnation, stream_id))

    def hangs(self, name: str) -> bool:
        """Whether a process's steps do not end."""
        ranks = self._world.runtime.ranks.get(name)
        return self._world.runtime.disks.get(name, 0.0) >= HANG_S or (ranks is not None and ranks.hang)

    def may_be_late(self, name: str) -> bool:
        """Whether a process could not keep its own deadlines lately."""
        since = self._world.true_time - self.thawed.get(name, float("-inf"))
        ranks = self._world.runtime.ranks.get(name)
        slow = self._world.runtime.disks.get(name) or (ranks is not None and (ranks.late_s or ranks.hang))
        return since < AWAKE_S or bool(slow)


class WatchedWorker:
    """The rules of one worker."""

    def __init__(self, referee: Referee, worker: Worker[Any]) -> None:
        self._referee = referee
        self._worker = worker
        self._newest: dict[tuple[int, int], int] = {}  # (gateway, unit) -> highest attempt seen
        self._known: dict[Key, None] = {}
        self._fenced: dict[int, int] = {}
        self.incarnation = worker.incarnation

    def check(self, *_: object) -> None:
        worker = self._worker
        worker.check_integrity()
        assert isinstance(worker.slots, CheckedSlots)
        worker.slots.check_transfers()
        hangs = self._referee.hangs(worker.settings.name)
        must(hangs or not worker.wedged.is_set(), "wedged, though its steps end")
        self._check_sequences()
        self._check_deadlines()

    def fenced(self, gateway: int, highest: int) -> None:
        self._fenced[gateway] = max(highest, self._fenced.get(gateway, 0))

    # -- fencing ---------------------------------------------------------------------------------------------

    def _check_sequences(self) -> None:
        worker = self._worker
        ledger = worker.scheduler.memory.ledger
        for key, sequence in worker.scheduler.sequences.items():
            work = sequence.work
            unit = (work.gateway_incarnation, work.unit)
            if key not in self._known:
                self._known[key] = None
                begun_with = self._referee.tokens_at_begin(work.gateway_incarnation, work.stream_id)
                num_generated = len(work.generated) // 4
                must(begun_with is not None, "an attempt that no gateway has begun")
                if sequence.draws:
                    must(begun_with == num_generated, "token", num_generated, "is drawn again, of", begun_with)
                self._newest[unit] = max(work.attempt, self._newest.get(unit, 0))
            must(work.attempt == self._newest[unit], "attempt", work.attempt, "runs after", self._newest[unit])
            fenced = self._fenced.get(work.gateway_incarnation, 0)
            must(work.attempt > fenced, "attempt", work.attempt, "runs though fenced up to", fenced)
            counted = work.gateway_incarnation in worker.inbox._gateways._known
            must(counted, "works for a gateway that it counts as gone")
            dead_for = self._referee.dead_for(work.gateway_incarnation, worker)
            must(dead_for < DEAD_GATEWAY_S, "works for a gateway that died", dead_for, "s ago")
            holding = ledger.holding(key)
            if sequence.state in ("waiting", "opening"):
                must(holding is None and sequence.num_blocks == 0, "a queued sequence holds memory")
            else:
                must(holding is not None and len(holding.blocks) == sequence.num_blocks, "blocks of no holding")
                least = sequence.num_context + (worker.role == "decode")
                must(sequence.num_blocks >= worker.scheduler.memory.blocks_for(least), "a part of its memory only")

    # -- memory ----------------------------------------------------------------------------------------------

    def reserved(self, sequence: Sequence) -> None:
        worker, referee = self._worker, self._referee
        key = sequence.key
        holding = worker.scheduler.memory.ledger.holding(key)
        must(holding is not None, "reserved, and nothing is held")
        assert holding is not None
        if worker.role == "prefill":
            referee.took_memory(key)
        elif holding.state is BlockState.FETCHING:
            must(referee.prefill_has_held(key), "D takes memory for attempt", key[1], "before P has any")
        blocked = next((s for s in worker.scheduler._waiting if s.blocked_since is not None), None)
        if blocked is not None and blocked.order < sequence.order:
            waits = now() - blocked.blocked_since
            must(waits < worker.settings.overtake_ms / 1000, "overtaken after", waits, "s")

    def dropped(self, *dropped: Dropped) -> None:
        sequences = self._worker.scheduler.sequences.values()
        for item in dropped:
            if item.reason == "preempted" and not item.detail:  # else it was P that took it, and has been looked at
                older = any(other.order < item.sequence.order for other in sequences)
                holders = {other.work.attempt: other.state for other in sequences}
                what = (item.sequence.work.attempt, "of", self._worker.settings.name, "others", holders)
                must(older, "memory was taken from the oldest:", *what)

    def _check_deadlines(self) -> None:
        worker, moment = self._worker, now()
        if self._referee.may_be_late(worker.settings.name):
            return
        sequences = worker.scheduler.sequences
        doomed = 0
        for holding in worker.scheduler.memory.ledger:
            if holding.holder not in sequences:
                doomed += len(holding.blocks)
            elif holding.deadline is not None:
                must(holding.deadline > moment - OVERDUE_S, holding.state.value, "blocks are overdue")
        must(doomed == worker.scheduler.memory.num_doomed, "blocks of nobody:", doomed)
