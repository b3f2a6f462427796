"""The torch runner's rotation: tables in the model's dtype, one fused pass over all query and key heads of a step."""

from __future__ import annotations

import torch

from kvferry.engine.config import RopeConfig
from kvferry.engine.rope import rope_tables


class Rotation:
    """cos and sin for every position, rounded to the model's dtype.

    The sign of the rotation is folded into `sin` (its first half is negated), so that
    `x * cos + roll(x, head_dim / 2) * sin` rounds exactly where `x * cos + rotate_half(x) * sin` does.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        cos, sin = (torch.from_numpy(table) for table in rope_tables(rope, head_dim, length))
        self._half = head_dim // 2
        # [length, 1, head_dim], broadcast over heads
        self._cos = torch.cat((cos, cos), -1).to(device=device, dtype=dtype)[:, None]
        self._sin = torch.cat((-sin, sin), -1).to(device=device, dtype=dtype)[:, None]

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin [num_rows, 1, head_dim] of `positions` [num_rows]."""
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)

    def rotate(self, heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`heads` [num_rows, num_heads, head_dim] -> the same shape, contiguous."""
        return torch.mul(heads, cos).add_(heads.roll(self._half, -1).mul_(sin))
