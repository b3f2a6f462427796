"""Masks that stay as they are, for tests of what is drawn through one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvferry.schedule.step import MaskWords
from kvferry.wire.fields import TokenArray


class FixedMask:
    """Implements `TokenMask`."""

    def __init__(self, words: MaskWords, fault: str | None = None) -> None:
        self.fault = fault
        self._words = words

    def begin(self) -> None:
        pass

    def advance(self, generated: TokenArray) -> None:
        pass

    def words(self) -> MaskWords | None:
        return self._words


def mask_of(allowed: npt.NDArray[np.bool_]) -> FixedMask:
    """From one truth value per token [vocab]."""
    packed = np.packbits(allowed, bitorder="little")
    return FixedMask(np.concatenate((packed, np.zeros(-len(packed) % 4, np.uint8))).view("<u4"))
