"""How much KV may be asked for while streams decode. Pure.

Receiving, checking and scattering KV takes CPU from the decode step beside it. P often holds most of a prompt when
D asks for it, and would send all of that at once: the step of that moment then takes several times its length. But
a transfer hides behind the prefill as long as it ends by the time that the prefill does, so it need not be fast:
while streams decode, each step is followed by credits for no more bytes than take `share` of a step to land, or one
frame. What counts is what a frame will bring: a short prompt's only one costs less than a full one, and the manifest
nothing, so that short pulls which come at once do not wait for each other's steps.

A chunk that P has computed is several frames. So credits that P has not used yet count, too: else they would pile up
to a window while it computes, and all be used at once when the chunk is done.
"""

from __future__ import annotations

import math

from kvferry.worker.handoff.timing import TransferRate


class Pace:
    """Credits of all pulls of a worker. `unpaced` is the rate of pulls that nothing held back."""

    def __init__(self, share: float, frame_bytes: int, unpaced: TransferRate) -> None:
        """`share` of a step may be spent on landing; 1 holds nothing back."""
        self._share = share
        self._frame_bytes = frame_bytes
        self._unpaced = unpaced
        self._step_s: float | None = None  # None: no stream is disturbed
        self._left = 0.0  # bytes

    def begin_step(self, step_s: float | None) -> None:
        """A step begins that will take about `step_s`. None: none does, or one without streams that decode."""
        self._step_s = step_s if self._share < 1 else None
        self._left = self._bytes_per_step(self._step_s or 0.0)

    def take(self, wanted: int, num_open: int, missing_bytes: int) -> int:
        """Of `wanted` credits of a pull those that may be given now. It lacks `missing_bytes`, and `num_open` credits
        are not used yet."""
        if self._step_s is None:
            return wanted
        asked = min(missing_bytes, num_open * self._frame_bytes)
        room = min(self._left, self._bytes_per_step(self._step_s) - asked)
        given = taken = 0
        while given < wanted and (cost := min(self._frame_bytes, missing_bytes - asked - taken)) <= room - taken:
            given += 1
            taken += cost
        self._left -= taken
        return given

    def seconds(self, num_bytes: int) -> float:
        """How long so many bytes take at the present pace."""
        unpaced = self._unpaced.seconds(num_bytes)
        if self._step_s is None:
            return unpaced
        return max(unpaced, math.ceil(num_bytes / self._bytes_per_step(self._step_s)) * self._step_s)

    def _bytes_per_step(self, step_s: float) -> float:
        return max(self._frame_bytes, self._share * step_s * self._unpaced.bytes_per_s)
