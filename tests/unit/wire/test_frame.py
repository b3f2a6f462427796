"""The KV frame: what was sealed comes out, and nothing else does."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvferry.errors import CorruptFrame
from kvferry.wire.codec import WIRE_VERSION
from kvferry.wire.frame import (
    DTYPE_BYTES,
    DTYPE_CODES,
    HEADER_BYTES,
    KIND_KV,
    KIND_MANIFEST,
    KIND_PAD,
    NO_PIECE,
    FrameHeader,
    Piece,
    check,
    seal,
)

PAYLOAD = random.Random(0).randbytes(2 * 2 * 8 * 3 * 4 * 2)
PIECE = Piece(1, 3, 16, 24, 0, 3)
HEADER = FrameHeader(KIND_KV, 7, 3, PIECE, "bfloat16", len(PAYLOAD))

# Version 1: the header up to its checksum. Never to change.
GOLDEN = "564b0101070000000300000001000300100000001800000000000300010000000003000000000000"


def sealed(header: FrameHeader = HEADER, payload: bytes = PAYLOAD, slot_bytes: int = 4096) -> tuple[memoryview, int]:
    slot = memoryview(bytearray(b"\xaa" * slot_bytes))  # a slot that was used before
    slot[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
    return slot, seal(slot, header)


def refusal(slot: memoryview, received: int) -> str:
    with pytest.raises(CorruptFrame) as caught:
        check(slot, received)
    return caught.value.reason


u16, u32 = st.integers(0, (1 << 16) - 1), st.integers(0, (1 << 32) - 1)


@given(
    st.sampled_from([KIND_KV, KIND_MANIFEST, KIND_PAD]),
    u32,
    u32,
    st.builds(Piece, u16, u16, u32, u32, u16, u16),
    st.sampled_from(sorted(DTYPE_CODES)),
    st.binary(max_size=300),
)
def test_any_header_comes_back_equal(
    kind: int, pull_id: int, frame: int, piece: Piece, dtype: str, payload: bytes
) -> None:
    header = FrameHeader(kind, pull_id, frame, piece, dtype, len(payload))
    slot, length = sealed(header, payload)
    assert length == HEADER_BYTES + len(payload)
    assert check(slot, length) == header
    assert bytes(slot[HEADER_BYTES:length]) == payload


def test_the_header_of_version_1_is_as_recorded() -> None:
    assert WIRE_VERSION == 1
    slot, _ = sealed()
    assert bytes(slot[:40]).hex() == GOLDEN
    assert bytes(slot[48:64]) == bytes(16)


def test_every_flipped_bit_of_header_and_payload_is_caught() -> None:
    slot, length = sealed()
    for place in range(length):
        for bit in range(8):
            slot[place] ^= 1 << bit
            refusal(slot, length)
            slot[place] ^= 1 << bit
    assert check(slot, length) == HEADER, "and without a flip it is whole"


def test_a_frame_shorter_or_longer_than_it_says_is_refused_and_old_bytes_are_not_read() -> None:
    slot, length = sealed()
    for received in range(HEADER_BYTES):
        assert refusal(slot, received) == "short"
    assert refusal(slot, length - 1) == "short"
    assert refusal(slot, HEADER_BYTES) == "short"
    assert refusal(slot, length + 1) == "long"


def test_a_payload_of_another_frame_is_caught() -> None:
    slot, length = sealed()
    other, _ = sealed(FrameHeader(KIND_KV, 7, 4, PIECE, "bfloat16", len(PAYLOAD)))
    slot[:HEADER_BYTES] = other[:HEADER_BYTES]
    assert check(slot, length).frame == 4, "the same payload under its own header is fine"
    other[40:48] = sealed()[0][40:48]
    assert refusal(other, length) == "checksum", "the checksum covers the header, too"


def test_a_payload_of_zeros_is_told_from_one_of_another_length() -> None:
    short, long = bytes(64), bytes(128)
    slot, _ = sealed(FrameHeader(KIND_KV, 1, 0, PIECE, "float32", len(short)), short)
    longer, length = sealed(FrameHeader(KIND_KV, 1, 0, PIECE, "float32", len(long)), long)
    longer[40:48] = slot[40:48]
    assert refusal(longer, length) == "checksum"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 0),
        (1, 0),
        (2, 0),
        (2, WIRE_VERSION + 1),
        (3, 0),
        (3, 255),
        (28, 0),
        (28, 4),
        (29, 1),
        (30, 1),
        (36, 1),
        (48, 1),
    ],
)
def test_a_wrong_field_is_a_header_error_before_anything_is_summed(place: int, value: int) -> None:
    slot, length = sealed()
    slot[place] = value
    assert refusal(slot, length) == "header"


@given(st.binary(min_size=0, max_size=200), st.integers(0, 200))
def test_garbage_is_a_corrupt_frame_and_nothing_else(garbage: bytes, received: int) -> None:
    slot = memoryview(bytearray(garbage.ljust(256, b"\0")))
    refusal(slot, received)


def test_a_piece_knows_its_size() -> None:
    assert PIECE.num_bytes(4, "bfloat16") == len(PAYLOAD)
    assert (PIECE.num_layers, PIECE.num_tokens, PIECE.num_heads) == (2, 8, 3)
    assert NO_PIECE.num_bytes(64, "float32") == 0
    assert set(DTYPE_BYTES) == set(DTYPE_CODES)
