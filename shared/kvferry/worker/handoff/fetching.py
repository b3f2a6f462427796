"""The parts of pulls that one shard of a decode worker fetches. Which, and what becomes of them, is its leader's to say
(`orders.py`).

    Land ──> connecting ──FetchPart──> landing ──whole──> landed ──Settle──> gone
                 └───────── lost ─────────┴──────────────> told ──Settle──> gone

After Settle the part stays known until no copy writes its blocks, which the leader hears, and, if it was not right,
until P's shard has confirmed that it sends no more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np

from kvferry.errors import TransportError
from kvferry.runtime import TaskSet, now
from kvferry.transport.base import Connection
from kvferry.transport.pool import ConnectionPool
from kvferry.wire.flow import Abort, Aborted, Ack, FetchPart, Flow, FlowCodec
from kvferry.worker.handoff.hearing import Hearing
from kvferry.worker.handoff.landing import Dock, Landing, Target
from kvferry.worker.handoff.orders import Land, Landed, Lost, Progressed, Settle, Settled

ABORT_TIMEOUT: Final = 0.5
CONNECT_TIMEOUT: Final = 2.0


@dataclass(slots=True, eq=False)
class _Part:
    order: Land
    link: _Link | None = None
    landing: Landing | None = None
    num_copies: int = 0  # that write into the blocks now
    progressed: float = 0.0  # the last frame that the leader has heard of
    told: bool = False  # the leader knows that it has landed, or is lost
    settled: bool = False
    aborting_since: float | None = None


@dataclass(slots=True, eq=False)
class _Link:
    """A connection to a shard of a P, and the parts on it by pull."""

    connection: Connection
    parts: dict[int, _Part] = field(default_factory=dict)


class PartFetcher:
    """Only the event loop calls it."""

    def __init__(
        self,
        connections: ConnectionPool,
        dock: Dock,
        tasks: TaskSet,
        tell: Callable[[Progressed | Landed | Lost | Settled], None],
    ) -> None:
        """`tell`: the leader."""
        self._connections = connections
        self._dock = dock
        self._tasks = tasks
        self._tell = tell
        self._codec = FlowCodec()
        self._hearing = Hearing(dock.metrics)
        self._links: dict[Connection, _Link] = {}
        self._parts: dict[int, _Part] = {}  # that the leader has not heard to be settled

    def __len__(self) -> int:
        return len(self._parts)

    # -- what the leader says --------------------------------------------------------------------------------

    def hear(self, order: Land | Settle) -> None:
        match order:
            case Land():
                part = self._parts[order.part] = _Part(order)
                self._tasks.spawn(self._fetch(part), "fetch part")
            case Settle(number, right):
                self._settle(self._parts[number], right=right)

    async def _fetch(self, part: _Part) -> None:
        order = part.order
        try:
            connection = await self._connections.get(order.address, order.incarnation, CONNECT_TIMEOUT)
        except (TransportError, TimeoutError):
            self._lose(part, Lost(order.part, "prefill_lost", "connect"))
            return
        if part.settled:
            return
        link = self._links.get(connection)
        if link is None:
            link = self._links[connection] = _Link(connection)
            self._attach(link)
        part.link = link
        link.parts[order.pull_id] = part
        target = Target(
            order.pull_id,
            order.from_token,
            order.num_context,
            range(*order.heads),
            np.frombuffer(order.blocks, "<i4"),
            order.request_id,
            pin=functools.partial(self._pin, part),
            unpin=functools.partial(self._unpin, part),
        )
        part.landing = Landing(
            self._dock,
            connection,
            target,
            fetch=lambda credits: FetchPart(
                order.pull_id, order.ticket, order.attempt, order.from_token, credits, order.heads
            ),
            whole=functools.partial(self._whole, part),
            failed=lambda detail: self._lose(part, Lost(order.part, "transfer_failed", detail)),
        )
        await part.landing.start()

    def ask_for_more(self) -> None:
        """The pace may allow more than before."""
        for part in self._parts.values():
            if part.landing is not None:
                part.landing.ask_for_more()

    def _settle(self, part: _Part, *, right: bool) -> None:
        part.settled = True
        if part.landing is not None:
            asked = part.landing.incoming.num_posted > 0
            part.landing.finish()
            link, pull_id = part.link, part.order.pull_id
            if link is not None and link.parts.get(pull_id) is part:
                if asked and not right:
                    part.aborting_since = now()  # it stays on its link until P's shard has answered
                    self._send(link, Abort(pull_id))
                else:
                    del link.parts[pull_id]
                    if asked:
                        self._send(link, Ack(pull_id))
        self._maybe_over(part)

    # -- what happens ----------------------------------------------------------------------------------------

    def _whole(self, part: _Part) -> None:
        if part.told:
            return  # a pad has come behind the manifest, while other parts are not there yet
        assert part.landing is not None
        incoming = part.landing.incoming
        assert incoming.manifest is not None
        part.told = True
        self._tell(Landed(part.order.part, incoming.manifest, incoming.manifest_frame, incoming.num_bytes))

    def _lose(self, part: _Part, word: Lost) -> None:
        if part.settled or part.told:
            return
        part.told = True
        self._tell(word)

    def _pin(self, part: _Part) -> None:
        part.num_copies += 1

    def _unpin(self, part: _Part) -> None:
        part.num_copies -= 1
        self._maybe_over(part)

    def _maybe_over(self, part: _Part) -> None:
        if part.settled and not part.num_copies and self._parts.pop(part.order.part, None) is not None:
            self._tell(Settled(part.order.part))

    # -- connections -----------------------------------------------------------------------------------------

    def _attach(self, link: _Link) -> None:
        link.connection.on_message(lambda payload: self._on_message(link, payload))
        link.connection.on_closed(lambda: self._on_closed(link))

    def _on_message(self, link: _Link, payload: memoryview) -> None:
        message = self._hearing.understand(link.connection, payload)
        if message is None:
            return
        if not isinstance(message, Aborted):
            self._hearing.distrust(link.connection, "unexpected")
            return
        part = link.parts.pop(message.pull_id, None)
        if part is None:
            return  # it has ended on this side already
        if part.aborting_since is None:
            self._send(link, Abort(message.pull_id))  # confirms: no credit follows
        self._lose(part, Lost(part.order.part, "transfer_failed", message.reason))

    def _on_closed(self, link: _Link) -> None:
        self._links.pop(link.connection, None)
        parts, link.parts = list(link.parts.values()), {}
        for part in parts:
            self._lose(part, Lost(part.order.part, "prefill_lost", "connection lost"))

    def tick(self, moment: float) -> None:
        """Tell what goes on, and close connections on which an Abort was not answered: their receives come back so."""
        for part in self._parts.values():
            landing = part.landing
            if landing is None or part.told:
                continue
            if landing.waits_for_slot or landing.heard > part.progressed:
                part.progressed = landing.heard
                self._tell(Progressed(part.order.part))
        for link in list(self._links.values()):
            waits = [part.aborting_since for part in link.parts.values() if part.aborting_since is not None]
            if waits and moment - waits[0] > ABORT_TIMEOUT:
                self._dock.metrics.transfer_failures.labels("stall").inc()
                link.connection.abort()

    def _send(self, link: _Link, message: Flow) -> None:
        link.connection.send_message(self._codec.encode(message))
