"""Philox4x32-10 against the known-answer vectors published with Random123."""

from __future__ import annotations

import numpy as np
import pytest

from kvferry.engine.sampling.philox import philox4x32, uniform

ONES = 0xFFFFFFFF
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert philox4x32(counter, key) == expected


def test_the_uniform_is_the_upper_24_bits_of_the_first_word() -> None:
    seed = 0x299F31D0_A4093822  # low word first in the key
    word = philox4x32((3, 9, 0, 0), (0xA4093822, 0x299F31D0))[0]
    assert uniform(seed, 3, 9) == (word >> 8) / (1 << 24)


def test_uniforms_lie_in_the_unit_interval_and_are_exact_in_fp32() -> None:
    draws = [uniform(7, choice, index) for choice in range(4) for index in range(500)]
    assert all(0 <= draw < 1 and float(np.float32(draw)) == draw for draw in draws)
    assert abs(float(np.mean(draws)) - 0.5) < 0.03


@pytest.mark.parametrize("change", [(8, 0, 0), (7, 1, 0), (7, 0, 1), (7 + (1 << 40), 0, 0)])
def test_seed_choice_and_index_each_matter(change: tuple[int, int, int]) -> None:
    assert uniform(*change) != uniform(7, 0, 0)
