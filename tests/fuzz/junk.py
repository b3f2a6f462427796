"""Values that parsers and checks trip over."""

from __future__ import annotations

import random
from typing import Any, Final

STRINGS: Final = (
    "", " ", "\x00", "a\x00b", "\ufeff", "\u202e", "é" * 40, "🙂" * 20, "\ud7ff\ue000", "<|end|>", "null", "true", "-1",
    "{{ 7 * 7 }}", "{% for x in y %}", "../../etc/passwd", "%s%n", "data: [DONE]\n\n", "\r\nx: y", "*", ">", "a.b",
    "x" * 5000,
)  # fmt: skip
INTEGERS: Final = (
    -1, 0, 1, 2, 15, 16, 17, 127, 128, 255, 256, 257, 1023, 1024, 1025, 65535, 65536, (1 << 31) - 1, 1 << 31,
    (1 << 32) - 1, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, -(1 << 63), -(1 << 63) - 1,
    10**40,
)  # fmt: skip
FLOATS: Final = (0.0, -0.0, 0.5, 1.0, 1.5, -1.5, 2.0, 2.0000001, 1e-300, 5e-324, 1e308, -1e308, 100.0, -100.0, 1e16)


def scalar(chance: random.Random) -> Any:
    """Any JSON scalar, most of them odd."""
    match chance.randrange(6):
        case 0:
            return None
        case 1:
            return chance.random() < 0.5
        case 2:
            return chance.choice(INTEGERS)
        case 3:
            return chance.choice(FLOATS)
        case 4:
            return chance.choice(STRINGS)
        case _:
            return text(chance, chance.randrange(12))


def text(chance: random.Random, length: int) -> str:
    """Mostly ASCII; no surrogates, which are no text."""
    points = (
        chance.randrange(32, 127) if chance.random() < 0.8 else chance.choice((chance.randrange(0xD800), 0x1F642, 0))
        for _ in range(length)
    )
    return "".join(map(chr, points))


def value(chance: random.Random, depth: int = 3) -> Any:
    """Any JSON value."""
    kind = chance.randrange(8) if depth else 0
    if kind == 6:
        return [value(chance, depth - 1) for _ in range(chance.randrange(4))]
    if kind == 7:
        return {scalar_key(chance): value(chance, depth - 1) for _ in range(chance.randrange(4))}
    return scalar(chance)


def scalar_key(chance: random.Random) -> str:
    return chance.choice(STRINGS) if chance.random() < 0.3 else text(chance, chance.randrange(8))
