"""GGML's tensor formats as numpy code: stored blocks to float32, vectorised over all blocks of a call.

A row is cut into blocks of `block_size` values; each block stores its scales in front of its quants. In
the layouts below q[i] are unsigned quants, d, m half-precision scales.

    Q4_0   d | 16 bytes: q[i] low nibbles, q[i+16] high nibbles               (q - 8) d
    Q4_1   d, m | the same                                                    q d + m
    Q5_0   d | u32: fifth bits | the same                                     (q - 16) d
    Q5_1   d, m | u32: fifth bits | the same                                  q d + m
    Q8_0   d | 32 signed bytes                                                q d
    Q4_K   d, m | 12 bytes: eight 6-bit scales and mins | 128 bytes           q (d s) - (m t)
    Q5_K   d, m | 12 bytes | 32 bytes: fifth bits | 128 bytes                 q (d s) - (m t)
    Q6_K   128 bytes low | 64 bytes high | 16 signed scales | d               (q - 32) (d s)

The arithmetic is in float32 and in the order shown, so that results equal the reference's bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class BlockFormat:
    """How one tensor type is stored."""

    name: str
    block_size: int  # values in a block
    block_bytes: int
    expand: Callable[[Bytes], Floats]  # u8 [num_blocks, block_bytes] -> f32 [num_blocks, block_size]

    def dequantize(self, stored: bytes | Bytes) -> Floats:
        """f32 [num_values] of whole blocks."""
        blocks = np.frombuffer(stored, np.uint8) if isinstance(stored, bytes) else stored
        return self.expand(blocks.reshape(-1, self.block_bytes)).reshape(-1)


def to_bfloat16(values: Floats) -> npt.NDArray[np.uint16]:
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN. Same shape."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1)))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), ((bits >> 16) | np.uint32(0x40)).astype(np.uint16), rounded)


def _view(blocks: Bytes, first: int, count: int, dtype: Any) -> npt.NDArray[Any]:
    """`count` bytes of every block read as `dtype`: [num_blocks, count / itemsize]."""
    return np.ascontiguousarray(blocks[:, first : first + count]).view(dtype)


def _half(blocks: Bytes, first: int) -> Floats:
    """One half-precision scale of every block, f32 [num_blocks, 1]."""
    return _view(blocks, first, 2, "<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[..., n] -> [..., 2n]: all low nibbles, then all high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, first: int) -> Bytes:
    """Bit i of the little-endian u32 of every block, as 0 or 16: [num_blocks, 32]."""
    return np.unpackbits(blocks[:, first : first + 4], axis=-1, bitorder="little") << np.uint8(4)


def _f32(blocks: Bytes) -> Floats:
    return _view(blocks, 0, 4, "<f4").astype(np.float32, copy=False)


def _f16(blocks: Bytes) -> Floats:
    return _half(blocks, 0)


def _bf16(blocks: Bytes) -> Floats:
    return (_view(blocks, 0, 2, "<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(blocks: Bytes) -> Floats:
    return (_nibbles(blocks[:, 2:]).astype(np.int8) - np.int8(8)).astype(np.float32) * _half(blocks, 0)


def _q4_1(blocks: Bytes) -> Floats:
    return _nibbles(blocks[:, 4:]).astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q5_0(blocks: Bytes) -> Floats:
    quants = (_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).astype(np.int8) - np.int8(16)
    return quants.astype(np.float32) * _half(blocks, 0)


def _q5_1(blocks: Bytes) -> Floats:
    quants = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return quants.astype(np.float32) * _half(blocks, 0) + _half(blocks, 2)


def _q8_0(blocks: Bytes) -> Floats:
    return _view(blocks, 2, 32, np.int8).astype(np.float32) * _half(blocks, 0)


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """Eight 6-bit scales and eight 6-bit mins out of 12 bytes: two [num_blocks, 8].

    The low six bits of bytes 0..3 and 4..7 are scales and mins 0..3. Scales and mins 4..7 have their low
    four bits in the nibbles of bytes 8..11, and their high two on top of bytes 0..3 and 4..7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 0x3F, (third & 0x0F) | ((first >> 2) & 0x30)], axis=-1)
    mins = np.concatenate([second & 0x3F, (third >> 4) | ((second >> 2) & 0x30)], axis=-1)
    return scales, mins


def _k_affine(blocks: Bytes, quants: Bytes) -> Floats:
    """q (d s) - (m t) for quants [num_blocks, 8, 32] of Q4_K and Q5_K."""
    scales, mins = _k_scales(blocks[:, 4:16])
    scale = (_half(blocks, 0) * scales.astype(np.float32))[:, :, None]
    low = (_half(blocks, 2) * mins.astype(np.float32))[:, :, None]
    return (quants.astype(np.float32) * scale - low).reshape(-1, 256)


def _q4_k(blocks: Bytes) -> Floats:
    return _k_affine(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32))


def _q5_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    shifts = np.arange(8, dtype=np.uint8)[None, :, None]  # bit g of byte j belongs to quant j of group g
    high = (blocks[:, None, 16:48] >> shifts) & np.uint8(1)
    return _k_affine(blocks, low | (high << np.uint8(4)))


def _q6_k(blocks: Bytes) -> Floats:
    low = _nibbles(blocks[:, 0:128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32)
    shifts = np.array([0, 2, 4, 6], dtype=np.uint8)[None, None, :, None]
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & np.uint8(3)
    quants = (low | (high << np.uint8(4))).astype(np.int8) - np.int8(32)
    scales = _view(blocks, 192, 16, np.int8).astype(np.float32) * _half(blocks, 208)
    return (quants.reshape(-1, 16, 16).astype(np.float32) * scales[:, :, None]).reshape(-1, 256)


# By the type number that a GGUF file gives.
BLOCK_FORMATS: Final[dict[int, BlockFormat]] = {
    0: BlockFormat("F32", 1, 4, _f32),
    1: BlockFormat("F16", 1, 2, _f16),
    2: BlockFormat("Q4_0", 32, 18, _q4_0),
    3: BlockFormat("Q4_1", 32, 20, _q4_1),
    6: BlockFormat("Q5_0", 32, 22, _q5_0),
    7: BlockFormat("Q5_1", 32, 24, _q5_1),
    8: BlockFormat("Q8_0", 32, 34, _q8_0),
    12: BlockFormat("Q4_K", 256, 144, _q4_k),
    13: BlockFormat("Q5_K", 256, 176, _q5_k),
    14: BlockFormat("Q6_K", 256, 210, _q6_k),
    30: BlockFormat("BF16", 1, 2, _bf16),
}
