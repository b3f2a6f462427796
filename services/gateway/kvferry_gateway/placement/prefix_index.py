"""Which worker has which KV blocks cached, as far as this gateway has heard. Pure: events in, depths out.

A worker is a bit, a block an entry `key -> mask of its holders`, so the cached prefix of every worker at once
is a walk along the prompt's blocks with one AND each. The index only advises: a stale entry costs a wrong guess.

Events of one incarnation are numbered from 1, and each worker here is at one number:

    seq + 1            applied, and then those that came early, as long as they follow
    up to seq          old: doubled or overtaken, ignored
    above              early: kept (a few of them), the content stays as it is     -> Heard.GAP
    snapshot > seq     its last part completes the replacement of the content; then the early ones that follow it

The heartbeat says which number the worker is at; whoever is behind what the heartbeat *before* said has lost
something, be it the last batch, a snapshot's part or a resync, and `is_behind` says so again at every beat.
"""

from __future__ import annotations

import enum
import itertools
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from kvferry.kv.events import unpack_keys
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot

MAX_EARLY: Final = 16  # batches kept of a worker with a gap
MAX_SNAPSHOT_PARTS: Final = 256  # a million blocks
# 60 bits fit Python's smallest integers of two digits: 32 bytes instead of 48 for each block.
_KEY_SHIFT: Final = 4
_FEW_WORKERS: Final = 8

Depths = npt.NDArray[np.int32]


class Heard(enum.Enum):
    APPLIED = "applied"
    OLD = "old"
    PARTIAL = "partial"  # other parts of the snapshot are missing
    GAP = "gap"  # something before it was lost or is late
    UNKNOWN = "unknown"  # no heartbeat of this incarnation, or it is gone
    REFUSED = "refused"  # more blocks than the worker can have


@dataclass(slots=True)
class _Worker:
    name: str
    slot: int
    bit: int
    max_blocks: int
    seq: int = 0
    told: int = 0  # what its last heartbeat said
    num_blocks: int = 0
    keys: array[int] = field(default_factory=lambda: array("Q"))  # every key that it has, and some that it had
    early: dict[int, CacheEvents] = field(default_factory=dict)
    parts_seq: int = 0
    parts: dict[int, list[int]] = field(default_factory=dict)


class PrefixIndex:
    """Block keys of all workers of one gateway. Slots are small integers, given again after `detach`."""

    def __init__(self) -> None:
        self._holders: dict[int, int] = {}  # key -> bits of the workers that have it
        self._workers: dict[int, _Worker] = {}  # by incarnation
        self._bits: list[int] = []  # one integer object for each slot, shared by all blocks of a single holder
        self._free_slots: list[int] = []

    def __len__(self) -> int:
        """Different blocks."""
        return len(self._holders)

    @property
    def num_slots(self) -> int:
        return len(self._bits)

    def num_blocks(self, incarnation: int) -> int:
        """Blocks that this worker is known to have."""
        worker = self._workers.get(incarnation)
        return 0 if worker is None else worker.num_blocks

    # -- workers ---------------------------------------------------------------------------------------------

    def attach(self, incarnation: int, name: str, max_blocks: int) -> int:
        """A worker's slot, from its first heartbeat on. `name` is for messages: several workers may have one."""
        if (known := self._workers.get(incarnation)) is not None:
            return known.slot
        if self._free_slots:
            slot = self._free_slots.pop()
        else:
            slot = len(self._bits)
            self._bits.append(1 << slot)
        self._workers[incarnation] = _Worker(name, slot, self._bits[slot], max_blocks)
        return slot

    def detach(self, incarnation: int) -> None:
        """The worker is gone, and its blocks with it."""
        worker = self._workers.pop(incarnation, None)
        if worker is None:
            return
        self._remove(worker, worker.keys)
        self._free_slots.append(worker.slot)

    # -- events ----------------------------------------------------------------------------------------------

    def apply(self, events: CacheEvents) -> Heard:
        worker = self._workers.get(events.incarnation)
        if worker is None:
            return Heard.UNKNOWN
        if events.seq <= worker.seq:
            return Heard.OLD
        worker.early[events.seq] = events
        if events.seq == worker.seq + 1:
            return self._catch_up(worker)
        if len(worker.early) > MAX_EARLY:
            del worker.early[min(worker.early)]  # a snapshot has to cover it; the newest may follow that
        return Heard.GAP

    def load(self, part: CacheSnapshot) -> Heard:
        """Take a part of a snapshot: its blocks are known at once, what else was known goes with the last part.

        So that even the parts of a large cache cost about the same, and no part much.
        """
        worker = self._workers.get(part.incarnation)
        if worker is None:
            return Heard.UNKNOWN
        if part.seq <= worker.seq or part.seq < worker.parts_seq:
            return Heard.OLD
        if part.part >= part.num_parts or part.num_parts > MAX_SNAPSHOT_PARTS:
            return Heard.REFUSED
        if part.seq > worker.parts_seq:
            worker.parts_seq, worker.parts = part.seq, {}
        if part.part in worker.parts:
            return Heard.PARTIAL
        column = worker.parts[part.part] = index_keys(part.keys)
        if sum(map(len, worker.parts.values())) > worker.max_blocks:
            worker.parts = {}
            return Heard.REFUSED
        self._store(worker, column)
        if len(worker.parts) < part.num_parts:
            return Heard.PARTIAL
        keys = set(itertools.chain.from_iterable(worker.parts.values()))
        worker.parts = {}
        if worker.num_blocks > len(keys):
            self._remove(worker, [key for key in worker.keys if key not in keys])
        worker.seq = part.seq
        worker.early = {seq: events for seq, events in worker.early.items() if seq > part.seq}
        return self._catch_up(worker)

    def is_behind(self, incarnation: int, seq: int) -> bool:
        """Take the number in a worker's heartbeat. True: ask the worker for a snapshot."""
        worker = self._workers.get(incarnation)
        if worker is None:
            return False
        behind = worker.seq < worker.told
        worker.told = max(worker.told, seq)
        return behind

    def _catch_up(self, worker: _Worker) -> Heard:
        while (events := worker.early.pop(worker.seq + 1, None)) is not None:
            self._store(worker, index_keys(events.stored))
            self._remove(worker, index_keys(events.evicted))
            worker.seq += 1
            if worker.num_blocks > worker.max_blocks:
                # Its events can't be right. Forget them; a snapshot that fits may put things right.
                self._remove(worker, worker.keys)
                return Heard.REFUSED
        return Heard.GAP if worker.early else Heard.APPLIED

    def _store(self, worker: _Worker, keys: Iterable[int]) -> None:
        holders, bit, log = self._holders, worker.bit, worker.keys
        for key in keys:
            held = holders.get(key)
            if held is None:
                holders[key] = bit
            elif held & bit:
                continue
            else:
                holders[key] = held | bit
            log.append(key)
            worker.num_blocks += 1

    def _remove(self, worker: _Worker, keys: Iterable[int]) -> None:
        holders, bit = self._holders, worker.bit
        for key in keys:
            held = holders.get(key, 0)
            if not held & bit:
                continue
            held ^= bit
            if not held:
                del holders[key]
            else:
                holders[key] = self._bits[held.bit_length() - 1] if held & (held - 1) == 0 else held
            worker.num_blocks -= 1
        if len(worker.keys) > 2 * worker.num_blocks + 64:
            worker.keys = array("Q", {key for key in worker.keys if holders.get(key, 0) & bit})

    # -- lookup ----------------------------------------------------------------------------------------------

    def depths(self, keys: Sequence[int]) -> Depths:
        """How many blocks from the start of this chain each worker has, int32 [num_slots]."""
        depths = np.zeros(len(self._bits), dtype=np.int32)
        holders = self._holders
        alive = holders.get(keys[0], 0) if keys else 0
        depth = 0
        while alive:
            depth += 1
            still = alive & holders.get(keys[depth], 0) if depth < len(keys) else 0
            if still != alive:
                _mark(depths, alive ^ still, depth)
                alive = still
        return depths

    def check_integrity(self) -> None:
        """Derive every count anew. Raises AssertionError at the first contradiction."""
        bits = 0
        for worker in self._workers.values():
            held = {key for key, mask in self._holders.items() if mask & worker.bit}
            assert len(held) == worker.num_blocks, f"{worker.name}: {len(held)} blocks, counted {worker.num_blocks}"
            assert held <= set(worker.keys), f"{worker.name}: a block that detach would leave behind"
            assert len(worker.keys) <= 2 * worker.num_blocks + 65, f"{worker.name}: a log that grows for ever"
            bits |= worker.bit
        assert all(mask and not mask & ~bits for mask in self._holders.values()), "a block of nobody"


def index_keys(column: bytes) -> list[int]:
    """A column of block keys as `PrefixIndex` keeps them."""
    shifted: list[int] = (unpack_keys(column) >> np.uint64(_KEY_SHIFT)).tolist()
    return shifted


def _mark(depths: Depths, mask: int, depth: int) -> None:
    if mask.bit_count() <= _FEW_WORKERS:
        while mask:
            low = mask & -mask
            depths[low.bit_length() - 1] = depth
            mask ^= low
        return
    packed = np.frombuffer(mask.to_bytes(-(-len(depths) // 8), "little"), dtype=np.uint8)
    depths[np.unpackbits(packed, count=len(depths), bitorder="little").view(np.bool_)] = depth
