"""Changes to a string of bytes: what a faulty sender, a broken link or a hostile peer makes of it."""

from __future__ import annotations

import random

MAX_INSERTED = 40


def spoiled(chance: random.Random, given: bytes) -> bytes:
    """One to three changes."""
    data = bytearray(given)
    for _ in range(chance.randint(1, 3)):
        _spoil(chance, data)
    return bytes(data)


def _spoil(chance: random.Random, data: bytearray) -> None:
    place = chance.randrange(len(data)) if data else 0
    match chance.randrange(7):
        case 0 if data:
            data[place] ^= 1 << chance.randrange(8)
        case 1 if data:
            data[place] = chance.choice((0, 1, 0x7F, 0x80, 0xC1, 0xDD, 0xFF, chance.randrange(256)))
        case 2:
            del data[place:]
        case 3:
            data[place:place] = chance.randbytes(chance.randint(1, MAX_INSERTED))
        case 4:
            del data[place : place + chance.randint(1, 8)]
        case 5:
            data[place:place] = data[place : place + chance.randint(1, MAX_INSERTED)]
        case _:
            end = min(len(data), place + 4)
            data[place:end] = b"\xff" * (end - place)  # a length, if one stands there
