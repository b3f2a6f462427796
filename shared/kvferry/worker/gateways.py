"""The gateways that a worker serves: alive or gone, and which streams they still want. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from kvferry.bus.liveness import Liveness
from kvferry.wire.messages import GatewayHeartbeat, Work

# A stream may be accepted just before a heartbeat that was built without it.
MISSING_BEATS: Final = 2


@dataclass(slots=True)
class _Gateway:
    beats: int = 0
    live: frozenset[int] = frozenset()
    missing: dict[int, int] = field(default_factory=dict)  # stream_id -> heartbeats without it


class Gateways:
    """Judges gateways by their heartbeats, as `Liveness` does for everyone."""

    def __init__(self, incarnation: int, liveness: Liveness) -> None:
        self._incarnation = incarnation
        self._liveness = liveness
        self._known: dict[int, _Gateway] = {}

    @property
    def liveness(self) -> Liveness:
        return self._liveness

    def seen(self, gateway_incarnation: int, now: float) -> None:
        """A request came from it: it is alive, whether or not a heartbeat has arrived yet."""
        if gateway_incarnation not in self._known:
            self._known[gateway_incarnation] = _Gateway()
            self._liveness.observe(gateway_incarnation, now)

    def observe(self, beat: GatewayHeartbeat, works: list[Work], now: float) -> list[Work]:
        """Take a heartbeat; of `works` (this gateway's, here) return those it no longer wants."""
        self._liveness.observe(beat.incarnation, now)
        gateway = self._known.setdefault(beat.incarnation, _Gateway())
        live = {stream for worker, streams in beat.live if worker == self._incarnation for stream in streams}
        missing: dict[int, int] = {}
        unwanted: list[Work] = []
        for work in works:
            if work.stream_id in live:
                continue
            missing[work.stream_id] = gateway.missing.get(work.stream_id, 0) + 1
            if missing[work.stream_id] >= MISSING_BEATS:
                unwanted.append(work)
        gateway.missing = missing
        return unwanted

    def gone(self, now: float) -> list[int]:
        """Incarnations of gateways that have just been judged gone."""
        return [incarnation for incarnation in self._liveness.verdicts(now) if self._known.pop(incarnation, None)]
