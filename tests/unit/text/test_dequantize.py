"""GGML's formats, against a plain reading of their layouts and against digests of the reference.

The digests are of the float32 that the `gguf` package (0.19) makes of the same bytes.
"""

import hashlib
import struct

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvferry.text.dequantize import BLOCK_FORMATS, to_bfloat16

FORMATS = {block_format.name: block_format for block_format in BLOCK_FORMATS.values()}
HALVES = {"F16": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0]}
HALVES |= {"Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
DIGESTS = {
    "F32": "c03b9a1fe655ee8bf9c257ede7c91a90",
    "F16": "4b1dd40f8a7bcaff9509188cbe74af15",
    "Q4_0": "ced9cc4cba03d63352629d72d17e4c98",
    "Q4_1": "4602a73a35ee807d77b434a6987ed5ac",
    "Q5_0": "c3b82222db4f855a2e0e1b429fe80f94",
    "Q5_1": "c50183ee03a388a0f5a943325e917ed0",
    "Q8_0": "0e432e208af0ef7b0c3a99cf91783db1",
    "Q4_K": "a22f49fb4a4959a911bcf6ff8a59fc94",
    "Q5_K": "f9788c127cf0d4a61db9449a5dcb9896",
    "Q6_K": "d77628ba4f7b881f4ee46892809958e5",
    "BF16": "35f0a3bd055b15e2fdc86eb9dad78214",
}


def random_blocks(name: str, count: int) -> npt.NDArray[np.uint8]:
    """Arbitrary bytes, with scales that are ordinary numbers: [count, block_bytes]."""
    rng = np.random.default_rng(7)
    blocks = rng.integers(0, 256, (count, FORMATS[name].block_bytes), dtype=np.uint8)
    for first in HALVES.get(name, []):
        blocks[:, first : first + 2] = rng.uniform(-1, 1, (count, 1)).astype("<f2").view(np.uint8)
    if name in ("F32", "BF16"):
        blocks[:, -1] = rng.integers(0x3E, 0x41, count)  # exponents of ordinary numbers
    return blocks


def plain(name: str, block: bytes) -> list[float]:
    """One block, value by value, in double precision, as the layout says."""

    def half(first: int) -> float:
        return float(struct.unpack_from("<e", block, first)[0])

    if name == "F32":
        return list(struct.unpack("<f", block))
    if name == "F16":
        return [half(0)]
    if name == "BF16":
        return list(struct.unpack("<f", b"\0\0" + block))
    if name == "Q8_0":
        return [half(0) * q for q in struct.unpack_from("<32b", block, 2)]
    if name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        affine = name.endswith("1")
        quants_at = len(block) - 16
        fifth = struct.unpack_from("<I", block, quants_at - 4)[0] if name.startswith("Q5") else 0
        values = []
        for i in range(32):
            byte = block[quants_at + i % 16]
            q = (byte & 15 if i < 16 else byte >> 4) + (16 if fifth >> i & 1 else 0)
            values.append(q * half(0) + half(2) if affine else (q - (16 if name == "Q5_0" else 8)) * half(0))
        return values
    if name == "Q6_K":
        values = []
        for i in range(256):
            part, rest = divmod(i, 128)
            group, j = divmod(rest, 32)
            low = block[64 * part + 32 * (group % 2) + j]
            low = low & 15 if group < 2 else low >> 4
            high = block[128 + 32 * part + j] >> 2 * group & 3
            scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
            values.append(half(208) * scale * ((low | high << 4) - 32))
        return values
    packed = block[4:16]
    values = []
    for i in range(256):
        group, j = divmod(i, 32)
        if group < 4:
            scale, low = packed[group] & 63, packed[group + 4] & 63
        else:
            scale = packed[group + 4] & 15 | packed[group - 4] >> 6 << 4
            low = packed[group + 4] >> 4 | packed[group] >> 6 << 4
        byte = block[len(block) - 128 + 32 * (group // 2) + j]
        q = byte & 15 if group % 2 == 0 else byte >> 4
        if name == "Q5_K":
            q |= (block[16 + j] >> group & 1) << 4
        values.append(half(0) * scale * q - half(2) * low)
    return values


@pytest.mark.parametrize("name", FORMATS)
def test_values_are_those_that_the_layout_says(name: str) -> None:
    blocks = random_blocks(name, 20)
    expected = np.array([plain(name, block.tobytes()) for block in blocks])
    values = FORMATS[name].dequantize(blocks.tobytes())
    assert values.dtype == np.float32
    assert values.shape == (20 * FORMATS[name].block_size,)
    np.testing.assert_allclose(values, expected.reshape(-1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", FORMATS)
def test_values_equal_the_references_bit_for_bit(name: str) -> None:
    values = FORMATS[name].dequantize(random_blocks(name, 500).tobytes())
    assert hashlib.sha256(values.astype("<f4").tobytes()).hexdigest()[:32] == DIGESTS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_a_changed_bit_changes_a_value(name: str) -> None:
    blocks = random_blocks(name, 1)
    before = FORMATS[name].dequantize(blocks.tobytes())
    blocks[0, -1 if name != "Q6_K" else 0] ^= 1
    assert (FORMATS[name].dequantize(blocks.tobytes()) != before).any()


@given(bits=st.lists(st.integers(0, 0xFFFFFFFF), min_size=1, max_size=50))
def test_bfloat16_is_the_nearest_with_ties_to_even(bits: list[int]) -> None:
    values = np.array(bits, dtype=np.uint32).view(np.float32)
    mine = to_bfloat16(values)
    reference = torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert (mine[~nan] == reference[~nan]).all()
    assert np.isnan((mine[nan].astype(np.uint32) << 16).view(np.float32)).all()


def test_bfloat16_of_a_tie_is_even_and_of_a_truncation_would_not_be() -> None:
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001], dtype=np.uint32).view(np.float32)
    assert to_bfloat16(ties).tolist() == [0x3F80, 0x3F82, 0x3F81]
