"""bfloat16 in numpy: the upper 16 bits of an fp32, as u16."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint16]
Floats = npt.NDArray[np.float32]


def to_bf16(values: Floats) -> Bits:
    """Rounded to nearest, ties to even; a NaN stays one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    # Rounding could carry a NaN's payload over into an infinity.
    quiet = (bits >> 16) | 0x40
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, quiet, rounded).astype(np.uint16)


def from_bf16(bits: Bits) -> Floats:
    """Exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)
