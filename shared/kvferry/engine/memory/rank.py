"""One rank of the in-memory twin: the KV of its heads, and the follower that writes it."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from kvferry.engine.columns import Columns
from kvferry.engine.limits import Slots, slots_of
from kvferry.engine.memory.kv import Lanes, chain, expand, lanes_shape, restore
from kvferry.engine.ranks.copies import part_of
from kvferry.schedule.step import BlockTable, KVFormat, SequenceStep
from kvferry.wire.frame import DTYPE_BYTES, Piece

_UNWRITTEN: Final = 0xFF  # NaN in every float format, and no state that a sequence has
_MAX_KNOWN: Final = 4096


class MemoryCache:
    """KV of one rank's heads."""

    def __init__(
        self,
        kv_format: KVFormat,
        heads: range,
        num_blocks: int,
        memory: Callable[[int], mmap.mmap | memoryview] | None = None,
    ) -> None:
        """`heads`: the KV heads of the whole model that lie in it. `memory` maps so many bytes, else they are its own.
        What several ranks map is theirs in common: each makes it unwritten, before the first step."""
        self.heads = heads
        self._format = kv_format
        self._row = kv_format.head_dim * DTYPE_BYTES[kv_format.dtype]
        shape = list(lanes_shape(kv_format, num_blocks * kv_format.block_size))
        shape[3] = len(heads)
        # [layers, 2, num_slots, own kv_heads, head_dim * itemsize]
        if memory is None:
            self._blocks: Lanes = np.empty(shape, np.uint8)
        else:
            self._blocks = np.frombuffer(memory(int(np.prod(shape))), np.uint8).reshape(shape)
        self._blocks[:] = _UNWRITTEN
        self._states: dict[bytes, np.uint64] = {}  # what `restore` makes of one position's bytes, to be spared the work

    def write(self, steps: Sequence[SequenceStep], root: np.uint64) -> None:
        """The KV of a step's rows. `root`: the state before position 0."""
        for step in steps:
            known = min(step.start, 1)  # positions before the chunk that it goes on from
            end = step.start + len(step.tokens)
            slots = slots_of(step.block_table, step.start - known, end, self._format.block_size)
            states = chain(self._read_state(slots[0]) if known else root, step.tokens)
            lanes = self._blocks[:, :, slots[known:]] = expand(self._format, states, self.heads)
            self._know(lanes[:, :, -1].tobytes(), states[-1])

    def read(self, slots: Slots) -> Lanes:
        return self._blocks[:, :, slots]

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        """Copy what it has of a piece to its place in the frame."""
        if own := piece.heads_among(self.heads):
            part_of(out, piece, own, self._row)[...] = self._layers(piece, own)[:, :, self._slots(piece, block_table)]

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        """The reverse of `gather`."""
        if own := piece.heads_among(self.heads):
            part = part_of(payload, piece, own, self._row)
            self._layers(piece, own)[:, :, self._slots(piece, block_table)] = part

    def close(self) -> None:
        """Its memory goes with it."""

    def _layers(self, piece: Piece, own: range) -> Lanes:
        heads = slice(own.start - self.heads.start, own.stop - self.heads.start)
        return self._blocks[piece.layer_start : piece.layer_end, :, :, heads]

    def _slots(self, piece: Piece, block_table: BlockTable) -> Slots:
        return slots_of(block_table, piece.token_start, piece.token_end, self._format.block_size)

    def _read_state(self, slot: int) -> np.uint64:
        """A state that depends on every byte of one position, read from its block.

        The chain goes on from what lies in the block, not from the plan, so that a wrong byte spreads.
        """
        content = self._blocks[:, :, slot].tobytes()
        if content not in self._states:
            self._know(content, restore(self._format, self._blocks[:, :, [slot]], self.heads))
        return self._states[content]

    def _know(self, content: bytes, state: np.uint64) -> None:
        if len(self._states) >= _MAX_KNOWN:
            self._states.clear()
        self._states[content] = state


class MemoryFollower:
    """Implements `Follower`."""

    weight_bytes = 0

    def __init__(self, cache: MemoryCache, root: np.uint64) -> None:
        """`root`: the state before position 0."""
        self._cache = cache
        self._root = root

    def step(self, columns: Columns, *, head: bool) -> None:
        self._cache.write(columns.steps(), self._root)

    def head(self, rows: range) -> None:
        """The leader draws from the KV of all ranks."""

    def close(self) -> None:
        """Its memory goes with it."""
