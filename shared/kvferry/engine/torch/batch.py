"""From the sequences of a step to what one forward pass needs: rows in a good order, cache slots, attention groups.

Rows are put in the order (decoding sequences by falling context, then prefill chunks), so that every group
of the attention is a plain slice. Decoding sequences of like context share one batched product; padding
reads the null block. Everything here is numpy until `to_device`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from kvferry.engine.limits import Slots, slots_of
from kvferry.engine.torch.kv_cache import KVCache
from kvferry.schedule.step import SequenceStep

# A group pads every sequence to its longest context: this bounds the padding to a quarter of what is read.
MIN_GROUP_FILL: Final = 0.75


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences with one new row each."""

    start: int  # first row
    end: int
    slots: torch.Tensor  # [num_sequences * num_keys], shorter ones padded behind
    num_keys: int
    mask: torch.Tensor | None  # [num_kv_heads * num_sequences, 1, num_keys], 0 or -inf; None: no padding


@dataclass(frozen=True, slots=True)
class Chunk:
    """One sequence with several new rows."""

    start: int  # first row
    end: int
    slots: torch.Tensor  # [num_keys], of positions first_key, first_key + 1, …
    first_key: int
    position: int  # of the first row


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """Who attends to what, for the layers of one window."""

    window: int | None
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Batch:
    tokens: torch.Tensor  # int64 [num_rows]
    positions: torch.Tensor  # int64 [num_rows]
    slots: torch.Tensor  # int64 [num_rows]: where each row's KV goes
    attention: dict[int | None, AttentionPlan]  # by window
    rows: tuple[range, ...]  # of each SequenceStep, in plan order


def group_by_context(contexts: list[int]) -> list[tuple[int, int]]:
    """Split contexts (falling) into runs [start, end), each at least `MIN_GROUP_FILL` full."""
    groups: list[tuple[int, int]] = []
    start, kept = 0, 0
    for index, context in enumerate(contexts):
        width = index + 1 - start
        if index > start and (kept + context) < MIN_GROUP_FILL * width * contexts[start]:
            groups.append((start, index))
            start, kept = index, 0
        kept += context
    if contexts:
        groups.append((start, len(contexts)))
    return groups


def prepare(
    sequences: Sequence[SequenceStep],
    cache: KVCache,
    block_size: int,
    num_kv_heads: int,
    windows: frozenset[int | None],
    dtype: torch.dtype,
    device: torch.device,
) -> Batch:
    """Order the rows and work out the slots of the checked sequences of a step."""
    context = [step.start + len(step.tokens) for step in sequences]
    decoding = [index for index, step in enumerate(sequences) if len(step.tokens) == 1]
    decoding.sort(key=lambda index: -context[index])
    order = decoding + [index for index, step in enumerate(sequences) if len(step.tokens) > 1]
    rows: list[range] = [range(0)] * len(order)
    slots: list[Slots] = [np.empty(0, np.int64)] * len(order)  # of the whole context
    end = 0
    for index in order:
        rows[index] = range(end, end := end + len(sequences[index].tokens))
        slots[index] = slots_of(sequences[index].block_table, 0, context[index], block_size)
    steps = [sequences[index] for index in order]

    def to_device(array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    def attention(window: int | None) -> AttentionPlan:
        first = [0 if window is None else max(0, sequences[i].start + 1 - window) for i in range(len(order))]
        keys = [context[i] - first[i] for i in range(len(order))]
        groups = []
        for start, stop in group_by_context([keys[i] for i in decoding]):
            members = decoding[start:stop]
            num_keys = keys[members[0]]
            padded = np.full((len(members), num_keys), cache.null_block * block_size, np.int64)
            for row, i in enumerate(members):
                padded[row, : keys[i]] = slots[i][first[i] :]
            mask = None
            if keys[members[-1]] != num_keys:
                bias = np.zeros((len(members), 1, num_keys), np.float32)
                for row, i in enumerate(members):
                    bias[row, 0, keys[i] :] = -np.inf
                mask = to_device(bias).to(dtype).repeat(num_kv_heads, 1, 1)
            groups.append(DecodeGroup(start, stop, to_device(padded.reshape(-1)), num_keys, mask))
        chunks = [
            Chunk(rows[i].start, rows[i].stop, to_device(slots[i][first[i] :]), first[i], sequences[i].start)
            for i in order[len(decoding) :]
        ]
        return AttentionPlan(window, tuple(groups), tuple(chunks))

    return Batch(
        tokens=to_device(np.concatenate([step.tokens for step in steps]).astype(np.int64)),
        positions=to_device(np.concatenate([_positions(step) for step in steps])),
        slots=to_device(np.concatenate([slots[i][sequences[i].start :] for i in order])),
        attention={window: attention(window) for window in windows},
        rows=tuple(rows),
    )


def _positions(step: SequenceStep) -> Slots:
    return np.arange(step.start, step.start + len(step.tokens), dtype=np.int64)
