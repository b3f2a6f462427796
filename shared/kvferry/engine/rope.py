"""Rotary position embedding: frequencies and tables, in numpy, the same for every runner.

The arithmetic is that of Hugging Face transformers: powers, wavelengths and angles are fp32. Only powers, cosines
and sines themselves are taken in fp64 and rounded once, because a library's fp32 version of them differs from one
processor to the next.
"""

from __future__ import annotations

import math

import numpy as np

from kvferry.engine.bf16 import Floats
from kvferry.engine.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Floats:
    """[head_dim / 2], radians per position."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    base: Floats = np.float32(1) / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    if rope.kind == "linear":
        return base / np.float32(rope.factor)
    if rope.kind == "llama3":
        return _llama3(rope, base)
    if rope.kind == "yarn":
        return _yarn(rope, base, head_dim)
    return base


def rope_tables(rope: RopeConfig, head_dim: int, length: int) -> tuple[Floats, Floats]:
    """cos and sin [length, head_dim / 2] of positions 0, 1, …, scaled by the attention factor."""
    angles = np.arange(length, dtype=np.float32)[:, None] * inverse_frequencies(rope, head_dim)
    factor = np.float32(rope.attention_factor)
    wide = angles.astype(np.float64)
    return np.cos(wide).astype(np.float32) * factor, np.sin(wide).astype(np.float32) * factor


def _llama3(rope: RopeConfig, base: Floats) -> Floats:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high, factor = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor), np.float32(rope.factor)
    wavelength = np.float32(2 * math.pi) / base
    stretched = np.where(wavelength > rope.original_max_position / rope.low_freq_factor, base / factor, base)
    smooth = (np.float32(rope.original_max_position) / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (wavelength >= rope.original_max_position / rope.high_freq_factor) & (
        wavelength <= rope.original_max_position / rope.low_freq_factor
    )
    mixed: Floats = np.where(between, blended, stretched)
    return mixed


def _yarn(rope: RopeConfig, base: Floats, head_dim: int) -> Floats:
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
    steps = np.arange(head_dim // 2, dtype=np.float32)
    ramp = ((steps - np.float32(low)) / np.float32(high - low)).clip(0, 1)
    mixed: Floats = base / np.float32(rope.factor) * ramp + base * (1 - ramp)
    return mixed
