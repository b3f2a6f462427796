"""The gateways that a worker serves: alive or gone, and which streams they still want. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvferry.bus.liveness import Liveness
from kvferry.wire.beats import GatewayHeartbeat
from kvferry.wire.work import Work

# A stream may be accepted just before a heartbeat that was built without it.
MISSING_BEATS: Final = 2


@dataclass(slots=True)
class _Gateway:
    beat: int = 0  # highest number heard: one that came twice or late says nothing new
    missing: dict[int, int] = field(default_factory=dict)  # stream_id -> heartbeats without it


class Gateways:
    """Judges gateways by their heartbeats, as `Liveness` does for everyone."""

    def __init__(self, incarnation: int, liveness: Liveness) -> None:
        self._incarnation = incarnation
        self._known: dict[int, _Gateway] = {}
        self.liveness = liveness

    def __len__(self) -> int:
        return len(self._known)

    def seen(self, gateway_incarnation: int, now: float) -> None:
        """A request came from it: it is alive, whether or not a heartbeat has arrived yet."""
        self._known.setdefault(gateway_incarnation, _Gateway())
        self.liveness.observe(gateway_incarnation, now)

    def observe(self, beat: GatewayHeartbeat, works: list[Work], now: float) -> list[Work]:
        """Take a heartbeat; of `works` (this gateway's, here) return those it no longer wants."""
        self.liveness.observe(beat.incarnation, now)
        gateway = self._known.setdefault(beat.incarnation, _Gateway())
        if beat.beat <= gateway.beat:
            return []
        gateway.beat = beat.beat
        live = {stream for worker, streams in beat.live if worker == self._incarnation for stream in streams}
        before = gateway.missing
        gateway.missing = {w.stream_id: before.get(w.stream_id, 0) + 1 for w in works if w.stream_id not in live}
        return [work for work in works if gateway.missing.get(work.stream_id, 0) >= MISSING_BEATS]

    def gone(self, now: float) -> list[int]:
        """Incarnations of gateways that have just been judged gone."""
        return [incarnation for incarnation in self.liveness.verdicts(now) if self._known.pop(incarnation, None)]
