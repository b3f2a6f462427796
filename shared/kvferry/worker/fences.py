"""Which attempts a worker may serve: answers given, tombstones, fences. Pure.

- A repeated request gets the answer of the first (`docs/protocol.md`: idempotent by (ticket, attempt)).
- A cancel for an unknown attempt leaves a tombstone, so that the request it overtook is refused.
- A newer attempt of a unit replaces the older one; a fence refuses a gateway's attempts up to a number.
"""

from __future__ import annotations

from typing import Final

from kvferry.schedule.sequence import Key
from kvferry.wire.messages import RejectReason, Work

TOMBSTONE_S: Final = 30.0


class Fences:
    def __init__(self) -> None:
        self._expiry: dict[Key, float] = {}  # in order of insertion, hence of time
        self._accepted: dict[Key, float] = {}
        self._units: dict[tuple[int, int], Key] = {}  # (gateway incarnation, unit) -> newest attempt
        self._fenced: dict[int, int] = {}  # gateway incarnation -> highest fenced attempt

    def check(self, work: Work) -> RejectReason | None:
        """Why an attempt must be refused, or None."""
        if work.key in self._expiry:
            return "cancelled"
        if work.attempt <= self._fenced.get(work.gateway_incarnation, -1):
            return "stale_attempt"
        newest = self._units.get((work.gateway_incarnation, work.unit))
        if newest is not None and newest[1] > work.attempt:
            return "stale_attempt"
        return None

    def is_repeat(self, work: Work) -> bool:
        return work.key in self._accepted

    def accept(self, work: Work, now: float) -> Key | None:
        """Note an accepted attempt. Returns the older attempt of its unit, which is to be cancelled."""
        unit = (work.gateway_incarnation, work.unit)
        older = self._units.get(unit)
        self._units[unit] = work.key
        self._accepted[work.key] = now
        return older if older != work.key else None

    def forget(self, work: Work, now: float) -> None:
        """The attempt has ended here: late repeats of its request are refused for a while."""
        self._accepted.pop(work.key, None)
        unit = (work.gateway_incarnation, work.unit)
        if self._units.get(unit) == work.key:
            del self._units[unit]
        self.bury(work.key, now)

    def bury(self, key: Key, now: float) -> None:
        """Leave a tombstone."""
        self._expiry.setdefault(key, now + TOMBSTONE_S)

    def fence(self, gateway_incarnation: int, highest_attempt: int) -> None:
        before = self._fenced.get(gateway_incarnation, -1)
        self._fenced[gateway_incarnation] = max(before, highest_attempt)

    def forget_gateway(self, gateway_incarnation: int) -> None:
        self._fenced.pop(gateway_incarnation, None)

    def expire(self, now: float) -> None:
        while self._expiry:
            key = next(iter(self._expiry))
            if self._expiry[key] > now:
                break
            del self._expiry[key]
