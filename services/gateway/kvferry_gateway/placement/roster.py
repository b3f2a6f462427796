"""The live workers of one model in columns, one row each, so that a decision looks at a thousand of them with a few
array operations. Kept up to date by heartbeats and by the gateway's own placements; placement only reads it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvferry.wire.beats import Load, WorkerState
from kvferry.wire.record import WorkerRecord
from kvferry.wire.work import NUM_PRIORITY_CLASSES, priority_class
from kvferry_gateway.placement.estimates import Ewma, StepLine

Rows = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

# Stand-ins until a worker has measured itself: they only have to rank new workers sensibly.
NOMINAL_PREFILL_TOKENS_PER_S: Final = 1000.0
NOMINAL_STEP_BASE_S: Final = 0.01
NOMINAL_STEP_SLOPE_S: Final = 0.001
RATE_MEMORY: Final = 64.0  # heartbeats of one worker
FLEET_MEMORY: Final = 1024.0  # heartbeats of all workers of one role and numerics
# A queue is taken to drain since the heartbeat that told of it, but not for longer than heartbeats may be late.
MAX_DRAIN_S: Final = 0.5


class Roster:
    """Row numbers are small and given again after `remove`. Columns are [num_rows], and longer than need be."""

    kv_format: npt.NDArray[np.int64]
    numerics: npt.NDArray[np.int64]
    slot: npt.NDArray[np.int64]  # in the prefix index
    capacity: npt.NDArray[np.int64]  # longest prompt + output in tokens
    block_size: npt.NDArray[np.int64]
    token_bytes: npt.NDArray[np.int64]
    free_blocks: npt.NDArray[np.int64]
    ready: Mask
    exact: Mask
    rate: npt.NDArray[np.float64]  # prefill tokens a second
    step_base: npt.NDArray[np.float64]
    step_slope: npt.NDArray[np.float64]
    running: npt.NDArray[np.float64]
    waiting: npt.NDArray[np.float64]
    placed_requests: npt.NDArray[np.float64]
    placed_blocks: npt.NDArray[np.float64]
    as_of: npt.NDArray[np.float64]  # when `queued_tokens` was right
    queued_tokens: npt.NDArray[np.float64]  # [num_rows, NUM_PRIORITY_CLASSES], of this class or a more urgent one

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}  # incarnation -> row
        self._free: list[int] = []
        self._ids: dict[Hashable, int] = {}  # of formats, numerics
        self._by_role: dict[str, Rows] = {}
        self._lines: list[StepLine] = []
        self._rates: list[Ewma] = []
        self._fleet_rates: dict[tuple[str, str], Ewma] = {}
        self.records: list[WorkerRecord | None] = []
        self.incarnations: list[int] = []
        self._size = 0
        self._columns: dict[str, npt.NDArray[Any]] = {}
        self._allocate(64)

    def _allocate(self, size: int) -> None:
        """Every column, in its one place: zero where nothing else is said. Called again to grow."""

        def column(name: str, shape: tuple[int, ...], dtype: type) -> None:
            fresh: npt.NDArray[Any] = np.zeros(shape, dtype=dtype)
            if (old := self._columns.get(name)) is not None:
                fresh[: len(old)] = old
            self._columns[name] = fresh
            setattr(self, name, fresh)

        for name in ("kv_format", "numerics", "slot", "capacity", "block_size", "token_bytes", "free_blocks"):
            column(name, (size,), np.int64)
        for name in ("ready", "exact"):
            column(name, (size,), np.bool_)
        for name in ("rate", "step_base", "step_slope", "running", "waiting", "placed_requests"):
            column(name, (size,), np.float64)
        for name in ("placed_blocks", "as_of"):
            column(name, (size,), np.float64)
        column("queued_tokens", (size, NUM_PRIORITY_CLASSES), np.float64)
        self._size = size

    def __len__(self) -> int:
        return len(self._rows)

    def id_of(self, *name: Hashable) -> int:
        """The number of a KV format or a numerics_id: equal numbers, equal names; -1 if no worker had it."""
        return self._ids.get(name, -1)

    def _intern(self, *name: Hashable) -> int:
        return self._ids.setdefault(name, len(self._ids))

    def of_role(self, role: str) -> Rows:
        rows = self._by_role.get(role)
        if rows is None:
            found = [row for row in self._rows.values() if (record := self.records[row]) and record.role == role]
            rows = self._by_role[role] = np.asarray(found, dtype=np.intp)
        return rows

    def __contains__(self, incarnation: int) -> bool:
        return incarnation in self._rows

    def rows_of(self, incarnations: Iterable[int]) -> list[int]:
        """Those of them that are here."""
        return [row for incarnation in incarnations if (row := self._rows.get(incarnation)) is not None]

    def add(self, record: WorkerRecord, slot: int) -> None:
        """A worker's first heartbeat. `slot` is its number in the prefix index."""
        if record.incarnation in self._rows:
            return
        if self._free:
            row = self._free.pop()
        else:
            row = len(self.records)
            if row == self._size:
                self._allocate(2 * row)
            self.records.append(None)
            self.incarnations.append(0)
            self._lines.append(StepLine())
            self._rates.append(Ewma(RATE_MEMORY))
        for values in self._columns.values():
            values[row] = 0
        self._rows[record.incarnation] = row
        self._by_role.clear()
        self._lines[row], self._rates[row] = StepLine(), Ewma(RATE_MEMORY)
        self.records[row], self.incarnations[row] = record, record.incarnation
        self.kv_format[row] = self._intern("kv", record.kv_format_id)
        self.numerics[row] = self._intern("numerics", record.numerics_id)
        self.exact[row] = record.exact
        self.slot[row] = slot
        self.capacity[row] = min(record.max_model_len, record.num_blocks * record.block_size)
        self.block_size[row] = max(1, record.block_size)
        self.token_bytes[row] = record.kv_token_bytes
        self.step_base[row], self.step_slope[row] = NOMINAL_STEP_BASE_S, NOMINAL_STEP_SLOPE_S
        self.rate[row] = NOMINAL_PREFILL_TOKENS_PER_S

    def remove(self, incarnation: int) -> None:
        row = self._rows.pop(incarnation, None)
        if row is not None:
            self.records[row] = None
            self.ready[row] = False
            self._free.append(row)
            self._by_role.clear()

    def observe(self, incarnation: int, load: Load, state: WorkerState, now: float) -> None:
        """A heartbeat."""
        row = self._rows.get(incarnation)
        if row is None:
            return
        self.ready[row] = state == "ready"
        self.as_of[row] = now
        self.running[row], self.waiting[row] = load.num_running, load.num_waiting
        self.free_blocks[row] = load.free_blocks
        by_class = len(load.queued_tokens) == NUM_PRIORITY_CLASSES
        self.queued_tokens[row] = np.cumsum(load.queued_tokens) if by_class else load.waiting_tokens
        self.placed_requests[row] = self.placed_blocks[row] = 0.0
        if load.prefill_tokens_per_s:
            self.rate[row] = self._believed_rate(row, load.prefill_tokens_per_s)
        if load.decode_step_s and load.num_running:
            line = self._lines[row]
            line.observe(load.num_running, load.decode_step_s)
            if (fit := line.fit()) is not None:
                self.step_base[row], self.step_slope[row] = fit

    def _believed_rate(self, row: int, tokens_per_s: float) -> float:
        """The fleet's rate, unless this worker's differs from it by more than twice its own spread.

        Workers report the speed of their last steps, which depends on how long the prompts in them were. Equal
        workers must not look different for that: the one that looks faster would be given a queue.
        """
        record = self.records[row]
        assert record is not None, "a worker that is here has a record"
        fleet = self._fleet_rates.setdefault((record.role, record.numerics_id), Ewma(FLEET_MEMORY))
        own = self._rates[row]
        fleet.observe(tokens_per_s)
        own.observe(tokens_per_s)
        ratio = math.log(own.mean / fleet.mean)
        doubt = 2.0 * math.sqrt(own.variance) / own.mean
        return fleet.mean * math.exp(math.copysign(max(0.0, abs(ratio) - doubt), ratio))

    def placed(self, incarnation: int, now: float, num_tokens: int, num_blocks: int = 0, priority: int = 0) -> None:
        """A request was placed there: count it until the next heartbeat does.

        `num_tokens`: what it has to prefill there, without its cached prefix. `num_blocks`: what it will hold.
        """
        row = self._rows.get(incarnation)
        if row is None:
            return
        queued = self.queued_tokens[row]
        np.maximum(queued - self.rate[row] * min(max(0.0, now - self.as_of[row]), MAX_DRAIN_S), 0.0, out=queued)
        queued[priority_class(priority) :] += num_tokens
        self.as_of[row] = now
        self.placed_requests[row] += 1
        self.placed_blocks[row] += num_blocks

    def queue_seconds(self, rows: Rows, priority: int, now: float) -> npt.NDArray[np.float64]:
        """Until each of these workers would begin a prompt that is placed now."""
        drained = np.minimum(np.maximum(now - self.as_of[rows], 0.0), MAX_DRAIN_S)
        queued_s = self.queued_tokens[rows, priority_class(priority)] / self.rate[rows]
        return np.asarray(np.maximum(queued_s - drained, 0.0))
