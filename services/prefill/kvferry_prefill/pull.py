"""What P keeps of each connection and of each pull on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvferry.schedule.sequence import Key, Sequence
from kvferry.transport.base import Connection
from kvferry_prefill.outgoing import Outgoing


@dataclass(slots=True, eq=False)
class Pull:
    """One Open on one connection."""

    link: Link
    pull_id: int
    key: Key
    sequence: Sequence | None = None  # None while parked
    parked_until: float = 0.0
    outgoing: Outgoing | None = None  # from Fetch on
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ended: bool = False  # P has said Aborted unasked; D's Abort or Ack confirms that no credit follows

    @property
    def listed(self) -> bool:
        """Its connection still knows it: credits may come."""
        return self.link.pulls.get(self.pull_id) is self


@dataclass(slots=True, eq=False)
class Link:
    """One connection, its pulls, and the sends under way with the time they began, oldest first."""

    connection: Connection
    pulls: dict[int, Pull] = field(default_factory=dict)
    sends: dict[int, float] = field(default_factory=dict)  # by frame tag
