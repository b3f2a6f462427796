"""The few workers that are worth a closer look, and how ties are broken. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np

from kvferry_gateway.placement.estimates import FloatArray
from kvferry_gateway.placement.roster import Rows

SHORTLIST: Final = 16
# Costs this close are taken for equal. It bounds what breaking ties at random can lose.
TIE_SHARE: Final = 0.01
TIE_COST: Final = 0.001

_MASK: Final = (1 << 64) - 1
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)
_MIXER: Final = np.uint64(0xBF58476D1CE4E5B9)


def blurs(cost: FloatArray, rows: Rows, seed: int) -> FloatArray:
    """What to add to the costs [rows]: a little, by chance, the same for the same seed, row and cost.

    Gateways see the same heartbeats, and would all send their next requests to the one worker that looks
    best. With the request's ticket as seed they spread over all that look about as good.
    """
    mixed = rows.astype(np.uint64) * _MULTIPLIER + np.uint64(seed & _MASK)
    mixed ^= mixed >> np.uint64(30)
    mixed *= _MIXER
    mixed ^= mixed >> np.uint64(27)
    mixed *= _MULTIPLIER
    chance = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.asarray(chance * (TIE_SHARE * np.abs(cost) + TIE_COST))


def lowest(cost: FloatArray, width: int) -> Rows:
    """Positions of the `width` lowest costs, or of all, in no promised order."""
    if len(cost) <= width:
        return np.arange(len(cost))
    return np.argpartition(cost, width - 1)[:width]
