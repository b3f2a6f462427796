"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): the draws' randomness.

A counter-based generator has no state to lose: a draw is a function of (seed, choice, index), whatever worker
makes it and whatever was drawn before.
"""

from __future__ import annotations

from typing import Final

_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_MASK: Final = 0xFFFFFFFF
_ROUNDS: Final = 10

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Four random u32 words of a counter (four u32) under a key (two u32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        a, b = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & _MASK, (a >> 32) ^ c3 ^ k1, a & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform24(seed: int, choice: int, index: int) -> int:
    """The draw's uniform in units of 2⁻²⁴: the upper 24 bits of the first output word.

    Key words are the low and the high half of the 64-bit seed, counter words are (choice, index, 0, 0).
    """
    key = (seed & _MASK, (seed >> 32) & _MASK)
    return philox4x32((choice & _MASK, index & _MASK, 0, 0), key)[0] >> 8


def uniform(seed: int, choice: int, index: int) -> float:
    """The same in [0, 1), exact in fp32."""
    return uniform24(seed, choice, index) * 2.0**-24
