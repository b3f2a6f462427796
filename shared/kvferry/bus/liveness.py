"""Who is alive, judged from heartbeats and whatever else is heard. Pure: every call gets the observer's own clock, in
seconds.

                observe                     silent, or ping refused or unanswered
    (unknown) ----------> alive ----------------------------------------> gone ----> (forgotten)
                            ^                  verdicts()                   |
                            +----------------------------------------------+
                                   observe: RETURNED, after a freeze

An incarnation is judged by what it says itself: a restarted process of the same name is another incarnation,
and neither speaks for the other. Nobody is judged while the observer itself could not have heard:

- while its bus is down, and for `BUS_GRACE` after: others reconnect up to a second later;
- after its loop has stalled, for `STALL_GRACE`: the heartbeats are there, but were not read yet.

A connection error or an exit notice is only a suspicion. It prompts a ping, whose silence is the verdict.
Around an outage of the bus nobody is suspected: a ping would find nobody where a peer has not reconnected yet.

The shell calls `tick` every `BEAT_INTERVAL`, and takes `verdicts` after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

BEAT_INTERVAL: Final = 0.25  # seconds between the heartbeats of a process
SILENCE: Final = 1.2  # seconds without a word: gone
PING_TIMEOUT: Final = 0.2
STALL: Final = 0.25  # a tick later than this shows that the observer's loop stood still
STALL_GRACE: Final = 2 * BEAT_INTERVAL
BUS_GRACE: Final = SILENCE + BEAT_INTERVAL
MEMORY: Final = 600.0  # seconds that a gone incarnation is known, to be recognised when it returns


class Seen(Enum):
    """What a heartbeat means to the observer."""

    NEW = "new"
    ALIVE = "alive"
    RETURNED = "returned"  # it was judged gone: its old work has been placed elsewhere


@dataclass(slots=True)
class _Peer:
    heard: float
    suspected: float | None = None  # when the ping was due, while its answer is awaited
    refused: bool = False  # the ping found nobody
    gone: float | None = None  # when it was judged


class Liveness:
    """One observer's view of all incarnations that it has heard."""

    def __init__(self, now: float) -> None:
        self._peers: dict[int, _Peer] = {}  # in the order of first hearing
        self._bus_is_up = True
        self._judges_from = now
        self._suspects_from = now
        self._ticked = now

    def __contains__(self, incarnation: int) -> bool:
        """Whether it is alive, as far as is known."""
        peer = self._peers.get(incarnation)
        return peer is not None and peer.gone is None

    @property
    def alive(self) -> tuple[int, ...]:
        return tuple(incarnation for incarnation, peer in self._peers.items() if peer.gone is None)

    def silent_for(self, incarnation: int, now: float) -> float:
        """Seconds since it was last heard; raises KeyError for one never heard."""
        return now - self._peers[incarnation].heard

    def observe(self, incarnation: int, now: float) -> Seen:
        """A heartbeat came."""
        peer = self._peers.get(incarnation)
        if peer is None:
            self._peers[incarnation] = _Peer(now)
            return Seen.NEW
        peer.heard = now
        if peer.gone is None:
            # A heartbeat clears no suspicion: it may have been sent before the process ended.
            return Seen.ALIVE
        self._peers[incarnation] = _Peer(now)
        return Seen.RETURNED

    def heard(self, incarnation: int, now: float) -> None:
        """Another message of its own came. To an observer that is behind, its heartbeats may still be on their way."""
        peer = self._peers.get(incarnation)
        if peer is not None and peer.gone is None:
            peer.heard = now

    def suspect(self, incarnation: int, now: float) -> bool:
        """A connection to it failed, or its supervisor says that it ended. True: ping it now."""
        if not self._bus_is_up or now < self._suspects_from:
            return False
        peer = self._peers.get(incarnation)
        if peer is None or peer.gone is not None or peer.suspected is not None:
            return False
        peer.suspected = now
        return True

    def answered(self, incarnation: int, now: float) -> None:
        """Its pong came."""
        peer = self._peers.get(incarnation)
        if peer is not None and peer.gone is None:
            peer.heard = now
            peer.suspected = None
            peer.refused = False

    def refused(self, incarnation: int) -> None:
        """The ping found no responders: its subscription is gone, so there is nothing to wait for."""
        peer = self._peers.get(incarnation)
        if peer is not None and peer.suspected is not None:
            peer.refused = True

    def forget(self, incarnation: int) -> None:
        """It said goodbye, or its owner has no more use for it: no verdict will come."""
        self._peers.pop(incarnation, None)

    def bus_down(self, now: float) -> None:
        self._bus_is_up = False

    def bus_up(self, now: float) -> None:
        self._bus_is_up = True
        self._judges_from = self._suspects_from = now + BUS_GRACE
        for peer in self._peers.values():
            peer.suspected = None  # the answer to its ping was lost with the connection
            peer.refused = False

    def tick(self, now: float) -> None:
        if self._stalled(now):
            self._judges_from = max(self._judges_from, now + STALL_GRACE)
            for peer in self._peers.values():
                if peer.suspected is not None:
                    peer.suspected = now  # the answer to its ping may be there, unread
        self._ticked = now

    def verdicts(self, now: float) -> tuple[int, ...]:
        """Incarnations that are gone since the last call, in the order of first hearing them."""
        if not self._bus_is_up or now < self._judges_from or self._stalled(now):
            return ()
        newly: list[int] = []
        for incarnation, peer in list(self._peers.items()):
            if peer.gone is not None:
                if now - peer.gone > MEMORY:
                    del self._peers[incarnation]
            elif _is_gone(peer, now):
                peer.gone = now
                newly.append(incarnation)
        return tuple(newly)

    def _stalled(self, now: float) -> bool:
        return now - self._ticked > BEAT_INTERVAL + STALL


def _is_gone(peer: _Peer, now: float) -> bool:
    if peer.refused or (peer.suspected is not None and now - peer.suspected > PING_TIMEOUT):
        return True
    return now - peer.heard > SILENCE
