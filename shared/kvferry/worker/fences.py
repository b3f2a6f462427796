"""Which attempts a worker may serve: answers given, tombstones, fences. Pure.

- A repeated request gets the answer of the first, also when the attempt has ended meanwhile
  (`docs/protocol.md`: idempotent by (ticket, attempt)).
- A cancel for an unknown attempt leaves a tombstone, so that the request it overtook is refused.
- A newer attempt of a unit replaces the older one, and refuses one that comes late, for a while after its own end, too;
  a fence refuses a gateway's attempts up to a number.

Everything is bounded: live attempts by the scheduler, the rest by time and by number, oldest out first.
"""

from __future__ import annotations

from typing import Final

from kvferry.schedule.sequence import Key
from kvferry.wire.work import RejectReason, Work

TOMBSTONE_S: Final = 30.0
MAX_TOMBSTONES: Final = 1 << 16
MAX_FENCES: Final = 1024  # gateways, by incarnation


class Fences:
    def __init__(self) -> None:
        self._live: dict[Key, None] = {}  # accepted and not ended
        self._buried: dict[Key, float] = {}  # cancelled -> when it may be forgotten, in order of time
        self._ended: dict[Key, float] = {}  # accepted, and ended by itself: likewise
        self._units: dict[tuple[int, int], Key] = {}  # (gateway incarnation, unit) -> newest attempt
        self._over: dict[tuple[int, int], float] = {}  # units whose newest is not live: likewise
        self._fenced: dict[int, int] = {}  # gateway incarnation -> highest fenced attempt

    def check(self, work: Work) -> RejectReason | None:
        """Why an attempt must be refused, or None."""
        if work.key in self._buried:
            return "cancelled"
        if work.attempt <= self._fenced.get(work.gateway_incarnation, -1):
            return "stale_attempt"
        newest = self._units.get((work.gateway_incarnation, work.unit))
        if newest is not None and newest[1] > work.attempt:
            return "stale_attempt"
        return None

    def is_repeat(self, work: Work) -> bool:
        """Whether this very attempt was accepted before; a cancelled one is no repeat any more."""
        return work.key in self._live or work.key in self._ended

    def accept(self, work: Work) -> Key | None:
        """Note an accepted attempt. Returns the older attempt of its unit, which is to be cancelled."""
        unit = (work.gateway_incarnation, work.unit)
        older = self._units.get(unit)
        self._over.pop(unit, None)
        self._units[unit] = work.key
        self._live[work.key] = None
        return older if older in self._live else None

    def end(self, work: Work, now: float) -> None:
        """The attempt has ended here by itself."""
        if self._leave(work, now):
            _remember(self._ended, work.key, now)

    def cancel(self, work: Work, now: float) -> None:
        """The attempt was cancelled: repeats of its request are refused for a while."""
        self._leave(work, now)
        self._ended.pop(work.key, None)
        self.bury(work.key, now)

    def bury(self, key: Key, now: float) -> None:
        """Leave a tombstone for an attempt that is not known here."""
        if key not in self._ended:
            _remember(self._buried, key, now)

    def fence(self, gateway_incarnation: int, highest_attempt: int) -> None:
        before = self._fenced.pop(gateway_incarnation, -1)
        self._fenced[gateway_incarnation] = max(before, highest_attempt)
        if len(self._fenced) > MAX_FENCES:
            del self._fenced[next(iter(self._fenced))]

    def expire(self, now: float) -> None:
        for graves in (self._buried, self._ended):
            while graves and graves[key := next(iter(graves))] <= now:
                del graves[key]
        while self._over and self._over[unit := next(iter(self._over))] <= now:
            self._forget(unit)

    def _leave(self, work: Work, now: float) -> bool:
        """Take the attempt off the live ones. False if it is not among them."""
        unit = (work.gateway_incarnation, work.unit)
        if self._units.get(unit) == work.key:
            self._over.setdefault(unit, now + TOMBSTONE_S)
            if len(self._over) > MAX_TOMBSTONES:
                self._forget(next(iter(self._over)))
        return self._live.pop(work.key, work.key) is None

    def _forget(self, unit: tuple[int, int]) -> None:
        del self._over[unit], self._units[unit]


def _remember(graves: dict[Key, float], key: Key, now: float) -> None:
    graves.setdefault(key, now + TOMBSTONE_S)
    if len(graves) > MAX_TOMBSTONES:
        del graves[next(iter(graves))]
