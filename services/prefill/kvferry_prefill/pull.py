"""What P keeps of each connection and of each pull on it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from kvferry.schedule.sequence import Key, Sequence
from kvferry.worker.handoff.outgoing import Outgoing
from kvferry.worker.handoff.serving import PartLink
from kvferry.worker.handoff.shards import Shard
from kvferry_prefill.source import SequenceSource


@dataclass(slots=True, eq=False)
class Feed:
    """A part of a pull that a shard sends."""

    shard: Shard
    number: int  # the shard's
    from_token: int
    source: SequenceSource | None = None  # while it is served
    finished: bool = False
    over: bool = False  # the shard has said so, once: it would not say it of what it is told to serve after that


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
    feeds: list[Feed] = field(default_factory=list)  # its other parts
    ended: bool = False  # P has said Aborted unasked; D's Abort or Ack confirms that no credit follows

    @property
    def listed(self) -> bool:
        return self.link.pulls.get(self.pull_id) is self


@dataclass(slots=True, eq=False)
class Link(PartLink):
    """One connection and its pulls."""

    pulls: dict[int, Pull] = field(default_factory=dict)
