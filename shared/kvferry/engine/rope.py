"""Rotary position embedding: tables made once, one fused rotation for all query and key heads of a step."""

from __future__ import annotations

import math

import torch

from kvferry.engine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> torch.Tensor:
    """fp32 [head_dim / 2], radians per position."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    base = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return base / rope.factor
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base, head_dim)
    return base


def _llama3(rope: RopeConfig, base: torch.Tensor) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    wavelength = 2 * math.pi / base
    stretched = torch.where(wavelength > rope.original_max_position / rope.low_freq_factor, base / rope.factor, base)
    smooth = (rope.original_max_position / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * stretched / rope.factor + smooth * stretched
    between = (wavelength >= rope.original_max_position / rope.high_freq_factor) & (
        wavelength <= rope.original_max_position / rope.low_freq_factor
    )
    return torch.where(between, blended, stretched)


def _yarn(rope: RopeConfig, base: torch.Tensor, head_dim: int) -> torch.Tensor:
    """NTK by parts: dimensions that turn often are kept, those that turn rarely are interpolated."""

    def dimension(turns: float) -> float:
        """The dimension that makes `turns` full turns over the original context."""
        ratio = rope.original_max_position / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = float(math.floor(low)), float(math.ceil(high))
    low, high = max(low, 0.0), min(high, head_dim - 1.0)
    if low == high:
        high += 0.001  # a step instead of a ramp, without a division by zero
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return base / rope.factor * ramp + base * (1 - ramp)


class RopeTable:
    """cos and sin for every position, rounded to the model's dtype.

    The sign of the rotation is folded into `sin` (its first half is negated), so that
    `x * cos + roll(x, head_dim / 2) * sin` rounds exactly where `x * cos + rotate_half(x) * sin` does.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, length: int, dtype: torch.dtype, device: torch.device) -> None:
        positions = torch.arange(length, dtype=torch.float32)
        angles = positions[:, None] * inverse_frequencies(rope, head_dim)  # [length, head_dim / 2]
        cos, sin = angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
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
