"""A step as columns: what the native library reads, and what the leader of several ranks tells the others.

Draws are not in it: the leader alone samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt

from kvferry.errors import MalformedMessage
from kvferry.schedule.step import SequenceStep

MAX_STEP_ROWS: Final = 1 << 17  # KVF_MAX_STEP_ROWS
MAX_STEP_SEQUENCES: Final = 4096  # KVF_MAX_SEQUENCES
MAX_TABLE_BYTES: Final = 32 << 20  # of all block tables of a step

Counts = npt.NDArray[np.int32]


class Wanted(IntEnum):
    """Which rows' logits a sequence of a step asks for."""

    NONE = 0
    LAST = 1
    ALL = 2


class ColumnsMessage(msgspec.Struct, frozen=True, array_like=True):
    """`Columns` on the way to another rank: little-endian, one column after the other."""

    per_sequence: Annotated[bytes, msgspec.Meta(max_length=4 * 4 * MAX_STEP_SEQUENCES)]
    tokens: Annotated[bytes, msgspec.Meta(max_length=4 * MAX_STEP_ROWS)]
    tables: Annotated[bytes, msgspec.Meta(max_length=MAX_TABLE_BYTES)]


class Columns:
    """The rows of a step's sequences, joined."""

    __slots__ = ("num_blocks", "num_rows", "start", "tables", "tokens", "wanted")

    def __init__(self, per_sequence: Counts, tokens: npt.NDArray[np.uint32], tables: Counts) -> None:
        """`per_sequence` [4, num_sequences]: rows, blocks of the table, position of the first row, `Wanted`."""
        self.num_rows, self.num_blocks, self.start, self.wanted = per_sequence
        self.tokens = tokens  # [rows of all]
        self.tables = tables  # [blocks of all]

    @classmethod
    def of(cls, steps: Sequence[SequenceStep], wanted: Sequence[Wanted]) -> Columns:
        """Raises RuntimeError for columns of another type than their sequences must have, and for too large a step."""
        tokens = np.concatenate([step.tokens for step in steps])
        tables = np.concatenate([step.block_table for step in steps])
        if tokens.dtype != np.uint32 or tables.dtype != np.int32:
            raise RuntimeError(f"tokens are {tokens.dtype} and blocks {tables.dtype}, must be uint32 and int32")
        if len(tokens) > MAX_STEP_ROWS or len(steps) > MAX_STEP_SEQUENCES or tables.nbytes > MAX_TABLE_BYTES:
            raise RuntimeError(f"a step of {len(tokens)} rows, {len(steps)} sequences and {len(tables)} blocks")
        rows = [
            [len(step.tokens) for step in steps],
            [len(step.block_table) for step in steps],
            [step.start for step in steps],
            wanted,
        ]
        return cls(np.asarray(rows, np.int32), tokens, tables)

    def steps(self) -> list[SequenceStep]:
        """The sequences again, views into the columns."""
        rows, blocks = np.cumsum(self.num_rows)[:-1], np.cumsum(self.num_blocks)[:-1]
        parts = zip(np.split(self.tokens, rows), self.start.tolist(), np.split(self.tables, blocks), strict=True)
        return [SequenceStep(index, *part) for index, part in enumerate(parts)]

    def message(self) -> ColumnsMessage:
        per_sequence = np.concatenate((self.num_rows, self.num_blocks, self.start, self.wanted))
        return ColumnsMessage(_bytes(per_sequence), _bytes(self.tokens), _bytes(self.tables))

    @classmethod
    def read(cls, message: ColumnsMessage) -> Columns:
        """Raises `MalformedMessage` for columns that do not fit together. What they name is checked by the engine."""
        try:
            per_sequence = np.frombuffer(message.per_sequence, "<i4").reshape(4, -1)
            columns = cls(per_sequence, np.frombuffer(message.tokens, "<u4"), np.frombuffer(message.tables, "<i4"))
        except ValueError as error:
            raise MalformedMessage(str(error)) from None
        counts = np.concatenate((columns.num_rows, columns.num_blocks))
        fits = len(counts) and counts.min() > 0 and set(columns.wanted.tolist()) <= set(Wanted)
        ends = (int(columns.num_rows.sum(dtype=np.int64)), int(columns.num_blocks.sum(dtype=np.int64)))
        if not fits or ends != (len(columns.tokens), len(columns.tables)):
            raise MalformedMessage("a step whose columns do not fit together")
        return columns


def _bytes(column: npt.NDArray[Any]) -> bytes:
    return column.astype(column.dtype.newbyteorder("<"), copy=False).tobytes()
