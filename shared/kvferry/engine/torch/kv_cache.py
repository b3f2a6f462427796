"""The paged KV cache of a torch runner: one tensor per layer, and the copies to and from frames.

A layer is `[2 * num_kv_heads, num_slots, head_dim]` of this rank's heads, keys' heads first. Slot
`block * block_size + offset` holds one position. Heads come before slots so that one `index_select` over slots
yields keys and values as contiguous matrices per head, which is what a batched matrix product reads.

Two blocks follow the pool's own:
- the null block is zero for ever. Padding reads it: memory of another sequence, or NaN in a reused block,
  can't reach a row through `0 * NaN`;
- the scratch block takes what a warm-up writes.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from kvferry.engine.limits import Slots, slots_of
from kvferry.runtime import mapped_memory
from kvferry.schedule.step import BlockTable, KVFormat
from kvferry.wire.frame import Piece

Rows = npt.NDArray[np.void]  # each item one head vector


class KVCache:
    def __init__(
        self,
        kv_format: KVFormat,
        heads: range,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        memory: Callable[[int], mmap.mmap | memoryview] | None = None,
    ) -> None:
        """`heads`: the KV heads of the whole model that lie in it. `memory` maps so many bytes that are zero; without
        it the memory is the cache's own."""
        self.heads = heads
        self.num_blocks = num_blocks
        self.null_block = num_blocks
        self.scratch_block = num_blocks + 1
        self._format = kv_format
        self._num_heads = len(heads)
        self._num_slots = (num_blocks + 2) * kv_format.block_size
        # each [2 * num_kv_heads, num_slots, head_dim]
        shape = (2 * self._num_heads, self._num_slots, kv_format.head_dim)
        if memory is None:
            self.layers = [_zeros(shape, dtype, device) for _ in range(kv_format.num_layers)]
        else:
            whole = (kv_format.num_layers, *shape)
            self.layers = list(_view(memory(math.prod(whole) * dtype.itemsize), whole, dtype))
        # On a CPU, whole head vectors are copied as raw bytes: several times the speed of torch's index_copy_.
        self._row: np.dtype[np.void] = np.dtype((np.void, kv_format.head_dim * dtype.itemsize))
        self._host = [_as_rows(layer, self._row) for layer in self.layers] if device.type == "cpu" else []

    def close(self) -> None:
        """Free the memory."""
        self.layers.clear()
        self._host.clear()

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store rows: `keys` and `values` [num_rows, num_kv_heads, head_dim] at `slots` [num_rows]."""
        cache = self.layers[layer]
        cache[: self._num_heads].index_copy_(1, slots, keys.transpose(0, 1))
        cache[self._num_heads :].index_copy_(1, slots, values.transpose(0, 1))

    def read(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values at `slots` [num_slots], each contiguous [num_kv_heads, num_slots, head_dim]."""
        both = self.layers[layer].index_select(1, slots)
        return both[: self._num_heads], both[self._num_heads :]

    @torch.inference_mode()
    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        """Copy what it has of a checked piece to its place in `out`, [layers, 2, tokens, kv_heads, head_dim]."""
        rows = self._rows(piece, block_table)
        frame = self._part(piece, out)
        for index, layer in enumerate(range(piece.layer_start, piece.layer_end)):
            if self._host:
                # The rows are checked; any other mode than "clip" would go through a buffer.
                np.take(self._host[layer], rows, out=frame[index], mode="clip")
            else:
                source = self.layers[layer].view(-1, self._format.head_dim)
                picked = source.index_select(0, torch.from_numpy(rows.reshape(-1)).to(source.device))
                frame[index] = _as_rows(picked.cpu(), self._row).reshape(rows.shape)

    @torch.inference_mode()
    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        """The reverse of `gather`."""
        rows = self._rows(piece, block_table)
        frame = self._part(piece, payload)
        for index, layer in enumerate(range(piece.layer_start, piece.layer_end)):
            if self._host:
                self._host[layer][rows] = frame[index]
            else:
                target = self.layers[layer].view(-1, self._format.head_dim)
                values = torch.from_numpy(frame[index].reshape(-1).view(np.uint8).copy()).to(target.device)
                where = torch.from_numpy(rows.reshape(-1)).to(target.device)
                target.index_copy_(0, where, values.view(target.dtype).view(-1, self._format.head_dim))

    def _part(self, piece: Piece, frame: memoryview) -> Rows:
        """This rank's heads of a frame, [layers, 2 * tokens, own heads] head vectors."""
        own = piece.heads_among(self.heads)
        rows = np.frombuffer(frame, self._row).reshape(piece.num_layers, 2 * piece.num_tokens, piece.num_heads)
        return rows[..., own.start - piece.head_start : own.start - piece.head_start + len(own)]

    def _rows(self, piece: Piece, block_table: BlockTable) -> Slots:
        """Rows of a layer viewed as [2 * num_kv_heads * num_slots] head vectors, as in `_part`."""
        slots = slots_of(block_table, piece.token_start, piece.token_end, self._format.block_size)
        own = piece.heads_among(self.heads)
        heads = np.arange(own.start, own.start + len(own), dtype=np.int64) - self.heads.start
        kinds = np.arange(2, dtype=np.int64)[:, None, None] * self._num_heads  # keys, values
        rows: Slots = ((kinds + heads) * self._num_slots + slots[:, None]).reshape(2 * len(slots), len(own))
        return rows


def _as_rows(tensor: torch.Tensor, row: np.dtype[np.void]) -> Rows:
    """A contiguous CPU tensor [..., head_dim] as head vectors of raw bytes, without a copy."""
    return tensor.view(torch.uint8).numpy().reshape(-1).view(row)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeroed memory; on a CPU as the native engine maps it."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return _view(mapped_memory(math.prod(shape) * dtype.itemsize), shape, dtype)


def _view(memory: mmap.mmap | memoryview, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(memory, np.uint8)).view(dtype).view(shape)
