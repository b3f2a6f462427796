"""The data plane of a decode worker: opens hand-offs, posts receives, lands frames, gives the verdict.

    open ──Open──> opening ──Progress: due──> (scheduler reserves) ──fetch──> fetching ──whole, verified──> gone
       │              └─ Unknown, Aborted ─> dropped                             ├─ bad frame: asked again
       └─ no connection: once more, then dropped                                 └─ failed: once more, then dropped

A pull that fails once is opened again with a new `pull_id`; the second failure drops the sequence. Slots come
back when their receives complete, whatever has become of the pull.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from kvferry.errors import CorruptFrame, TransportError, WireError
from kvferry.log import get_logger
from kvferry.runtime import Lane, TaskSet, now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.schedule.step import ModelRunner
from kvferry.transport.base import Connection
from kvferry.transport.pool import ConnectionPool
from kvferry.transport.slots import Slot, SlotPool
from kvferry.wire.flow import Abort, Aborted, Ack, Credit, Fetch, Flow, FlowCodec, Open, Progress, Unknown
from kvferry.wire.frame import frame_tag
from kvferry.wire.messages import EndReason, WorkerAddress
from kvferry.worker.digests import Digests
from kvferry.worker.metrics import WorkerMetrics
from kvferry_decode.incoming import Incoming, Landed, Tiling, land
from kvferry_decode.timing import TransferRate, is_due

log = get_logger(__name__)
WINDOW: Final = 4  # receives posted at once by one pull
ABORT_TIMEOUT: Final = 0.5
CONNECT_TIMEOUT: Final = 2.0
MAX_TRIES: Final = 2

# What D tells the gateway when P gives a pull up. None: the gateway knows already.
_ABORTED: Final[dict[str, EndReason | None]] = {
    "expired": "expired",
    "reclaimed": "preempted",
    "superseded": "expired",
    "cancelled": None,
    "draining": "draining",
    "ended": None,
    "refused": "transfer_failed",
}


@dataclass(slots=True, eq=False)
class _Pull:
    sequence: Sequence
    address: WorkerAddress
    tries: int = 0
    pull_id: int = 0
    link: _Link | None = None
    incoming: Incoming | None = None
    tiling: Tiling | None = None
    began: float = 0.0
    heard: float = 0.0  # last sign of life of this pull
    aborting_since: float | None = None
    posted: dict[int, Slot] = field(default_factory=dict)  # frame -> slot that the transport holds

    @property
    def key(self) -> Key:
        return self.sequence.key


@dataclass(slots=True, eq=False)
class _Link:
    """One connection and the pulls on it; an aborted pull stays until its Aborted has come."""

    connection: Connection
    pulls: dict[int, _Pull] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PullPolicy:
    pull_stall_s: float
    reserve_lead_s: float


class Puller:
    """All pulls of this worker. Only the event loop calls it."""

    def __init__(
        self,
        connections: ConnectionPool,
        runner: ModelRunner,
        slots: SlotPool,
        copy_lane: Lane,
        tasks: TaskSet,
        metrics: WorkerMetrics,
        digests: Digests,
        policy: PullPolicy,
        *,
        pin: Callable[[Sequence], None],
        unpin: Callable[[Sequence], None],
        due: Callable[[Key], None],
        fetched: Callable[[Sequence, int, int], None],
        failed: Callable[[Key, EndReason | None, str], None],
    ) -> None:
        self._connections = connections
        self._runner = runner
        self._slots = slots
        self._copy_lane = copy_lane
        self._tasks = tasks
        self._metrics = metrics
        self._digests = digests
        self._policy = policy
        self._pin = pin
        self._unpin = unpin
        self._due = due
        self._fetched = fetched
        self._failed = failed
        self._codec = FlowCodec()
        self._links: dict[Connection, _Link] = {}
        self._pulls: dict[Key, _Pull] = {}
        self._next_pull_id = 0
        self.rate = TransferRate()

    def __len__(self) -> int:
        return len(self._pulls)

    # -- opening ---------------------------------------------------------------------------------------------

    def open(self, sequence: Sequence, address: WorkerAddress) -> None:
        """Begin the hand-off of an accepted request."""
        pull = self._pulls[sequence.key] = _Pull(sequence, address)
        self._tasks.spawn(self._open(pull), "open")

    async def _open(self, pull: _Pull) -> None:
        pull.tries += 1
        try:
            connection = await self._connections.get(pull.address.shards[0], pull.address.incarnation, CONNECT_TIMEOUT)
        except (TransportError, TimeoutError) as error:
            self._metrics.transfer_failures.labels("connect").inc()
            if self._pulls.get(pull.key) is pull:
                self._retry(pull, "prefill_lost", type(error).__name__)
            return
        if self._pulls.get(pull.key) is not pull:
            return
        link = self._links.get(connection)
        if link is None:
            link = self._links[connection] = _Link(connection)
            self._attach(link)
        self._next_pull_id += 1
        pull.pull_id = self._next_pull_id
        pull.link = link
        pull.heard = now()
        link.pulls[pull.pull_id] = pull
        ticket, attempt = pull.key
        self._send(link, Open(pull.pull_id, ticket, attempt))

    def _attach(self, link: _Link) -> None:
        link.connection.on_message(lambda payload: self._on_message(link, payload))
        link.connection.on_closed(lambda: self._on_closed(link))

    def _on_message(self, link: _Link, payload: memoryview) -> None:
        try:
            message = self._codec.decode(payload)
        except WireError as error:
            self._metrics.wire_errors.labels("data", error.kind).inc()
            link.connection.abort()
            return
        if not isinstance(message, Progress | Unknown | Aborted):
            self._metrics.wire_errors.labels("data", "unexpected").inc()
            link.connection.abort()
            return
        pull = link.pulls.get(message.pull_id)
        if pull is None:
            return  # ended on this side already
        complete = isinstance(message, Progress) and message.num_computed >= message.num_tokens
        if not complete or pull.incoming is None:
            pull.heard = now()  # a P that has computed all owes frames, and only they show that it lives
        match message:
            case Progress():
                self._on_progress(pull, message)
            case Unknown():
                link.pulls.pop(pull.pull_id, None)
                self._metrics.transfer_failures.labels("unknown_ticket").inc()
                self._give_up(pull, "prefill_lost", "unknown ticket")
            case Aborted(_, _, reason):
                if pull.aborting_since is None:
                    self._send(link, Abort(pull.pull_id))  # confirms: no credit follows
                link.pulls.pop(pull.pull_id, None)
                if self._is_current(pull):
                    self._metrics.pulls.labels(f"aborted_{reason}").inc()
                    self._give_up(pull, _ABORTED.get(reason, "transfer_failed"), reason)

    def _on_progress(self, pull: _Pull, progress: Progress) -> None:
        if pull.incoming is not None or not self._is_current(pull):
            return
        if pull.sequence.state == "fetching":
            if progress.holds_memory:
                self.fetch(pull.sequence)  # a second try: the blocks are there already
        elif self._is_due(pull, progress):
            self._due(pull.key)

    def _is_current(self, pull: _Pull) -> bool:
        return self._pulls.get(pull.key) is pull

    def _is_due(self, pull: _Pull, progress: Progress) -> bool:
        num_bytes = self._runner.kv_format.token_bytes * pull.sequence.num_context
        return is_due(progress, self.rate.seconds(num_bytes), self._policy.reserve_lead_s)

    def _on_closed(self, link: _Link) -> None:
        self._links.pop(link.connection, None)
        for pull in list(link.pulls.values()):
            if self._is_current(pull) and pull.link is link:
                self._metrics.transfer_failures.labels("connection_lost").inc()
                self._retry(pull, "prefill_lost", "connection lost")
        link.pulls.clear()

    # -- fetching --------------------------------------------------------------------------------------------

    def fetch(self, sequence: Sequence) -> None:
        """The sequence has its blocks: ask for what its prefix cache lacks."""
        pull = self._pulls.get(sequence.key)
        if pull is None or pull.link is None:
            return  # its open failed meanwhile and tells the scheduler by itself
        kv = self._runner.kv_format
        pull.began = pull.heard = now()
        pull.incoming = Incoming(pull.pull_id, sequence.cached_tokens)
        pull.tiling = Tiling(kv, sequence.cached_tokens, sequence.num_context)
        self._tasks.spawn(self._start_fetch(pull, pull.link, pull.incoming), "fetch")

    async def _start_fetch(self, pull: _Pull, link: _Link, incoming: Incoming) -> None:
        label = f"pull {incoming.pull_id}"
        slots = [await self._slots.acquire(label)]
        while len(slots) < WINDOW and (slot := self._slots.try_acquire(label)) is not None:
            slots.append(slot)
        if incoming.over or link.connection.closed or not self._is_current(pull):
            for slot in slots:
                self._slots.release(slot)
            return
        pull.heard = now()
        for slot in slots:
            self._post(pull, link, incoming, slot)
        self._send(link, Fetch(pull.pull_id, incoming.from_token, len(slots)))

    def _post(self, pull: _Pull, link: _Link, incoming: Incoming, slot: Slot) -> None:
        frame = incoming.post()
        future = link.connection.receive(frame_tag(incoming.pull_id, frame), slot.view)
        self._slots.lend(slot, future)
        pull.posted[frame] = slot
        self._tasks.spawn(self._receive(pull, link, incoming, frame, future), "receive")

    async def _receive(
        self, pull: _Pull, link: _Link, incoming: Incoming, frame: int, future: asyncio.Future[int]
    ) -> None:
        """One posted receive, to its end: the slot is posted again or released, exactly once."""
        try:
            received: int | CorruptFrame = await future
        except CorruptFrame as error:
            received = error
        except TransportError:
            # `_on_closed` sees to the pull.
            if (slot := pull.posted.pop(frame, None)) is not None:
                self._slots.release(slot)
            return
        slot = pull.posted.pop(frame, None)
        if slot is None:
            return  # the pull was over: the slot has been let go
        try:
            if isinstance(received, CorruptFrame):
                raise received
            landed = await self._land(pull, incoming, slot, frame, received)
        except CorruptFrame as error:
            self._on_bad_frame(pull, link, incoming, slot, frame, error)
            return
        except Exception as error:
            self._on_failed_copy(pull, incoming, slot, error)
            return
        except asyncio.CancelledError:
            self._slots.release(slot)
            raise
        pull.heard = now()
        if landed is not None and incoming.good(landed):
            self._post_again(pull, link, incoming, slot)
        else:
            self._slots.release(slot)
        if incoming.whole and not incoming.over and self._is_current(pull):
            self._judge(pull, link, incoming)

    def _post_again(self, pull: _Pull, link: _Link, incoming: Incoming, slot: Slot) -> None:
        """Give the slot's credit anew, and more where the pull began with fewer slots than its window."""
        self._post(pull, link, incoming, slot)
        credits = 1
        while len(pull.posted) < WINDOW:
            more = self._slots.try_acquire(f"pull {incoming.pull_id}")
            if more is None:
                break
            self._post(pull, link, incoming, more)
            credits += 1
        self._send(link, Credit(incoming.pull_id, credits))

    def _on_failed_copy(self, pull: _Pull, incoming: Incoming, slot: Slot, error: Exception) -> None:
        """The runner could not scatter a good frame: a fault of this side, which costs the pull."""
        log.error("cannot scatter KV", request_id=pull.sequence.work.request_id, exc_info=error)
        self._metrics.transfer_failures.labels("scatter").inc()
        self._slots.release(slot)
        if not incoming.over and self._is_current(pull):
            self._retry(pull, "transfer_failed", type(error).__name__)

    def _on_bad_frame(
        self, pull: _Pull, link: _Link, incoming: Incoming, slot: Slot, frame: int, error: CorruptFrame
    ) -> None:
        self._metrics.transfer_failures.labels(error.reason).inc()
        log.warning("bad KV frame", reason=error.reason, request_id=pull.sequence.work.request_id, frame=frame)
        if incoming.over or not self._is_current(pull):
            self._slots.release(slot)
        elif incoming.bad():
            self._post(pull, link, incoming, slot)
            self._send(link, Credit(incoming.pull_id, 1, (frame,)))
        else:
            self._slots.release(slot)
            self._retry(pull, "transfer_failed", error.reason)

    async def _land(self, pull: _Pull, incoming: Incoming, slot: Slot, frame: int, received: int) -> Landed | None:
        """Check and scatter, on the copy lane; None if the pull was over before the frame came."""
        if incoming.over or not self._is_current(pull):
            return None
        sequence = pull.sequence
        assert pull.tiling is not None
        self._pin(sequence)
        try:
            landed = await self._copy_lane.run(
                land,
                self._runner,
                pull.tiling,
                sequence.block_table.copy(),
                slot.view,
                received,
                incoming.pull_id,
                frame,
            )
        finally:
            self._unpin(sequence)
        if landed.header.payload_bytes and landed.manifest is None:
            self._metrics.kv_bytes.labels("received").inc(landed.header.payload_bytes)
            if landed.header.piece.layer_start == 0:
                self._metrics.kv_tokens.labels("received").inc(landed.header.piece.num_tokens)
        return landed

    def _judge(self, pull: _Pull, link: _Link, incoming: Incoming) -> None:
        """All has come: let the sequence run only if the manifest fits what D knows."""
        sequence = pull.sequence
        manifest = incoming.manifest
        assert manifest is not None
        fault = incoming.fault(
            self._runner.kv_format.format_id,
            sequence.chain_hash(incoming.from_token),
            sequence.chain_hash(sequence.num_context),
        )
        token = dict(manifest.first_tokens).get(sequence.work.choice)
        if fault is None and token is None:
            fault = "first_token"
        if fault is not None:
            self._metrics.transfer_failures.labels(fault).inc()
            self._retry(pull, "transfer_failed", fault)
            return
        assert token is not None
        self._finish(pull)
        seconds = now() - pull.began
        num_tokens = sequence.num_context - incoming.from_token
        self.rate.observe(num_tokens * self._runner.kv_format.token_bytes, seconds)
        self._metrics.pulls.labels("received").inc()
        self._metrics.pull_seconds.observe(seconds)
        self._metrics.tail_seconds.observe(manifest.elapsed_s + (now() - pull.heard))
        self._send(link, Ack(pull.pull_id))
        link.pulls.pop(pull.pull_id, None)
        del self._pulls[pull.key]
        if self._digests.enabled:
            self._keep_digests(sequence, incoming.from_token)
        self._fetched(sequence, token, manifest.cached_tokens)

    def _keep_digests(self, sequence: Sequence, from_token: int) -> None:
        self._pin(sequence)
        digesting = self._digests.take(self._runner, self._copy_lane, sequence, from_token, self._unpin)
        self._tasks.spawn(digesting, "digest")

    # -- ends ------------------------------------------------------------------------------------------------

    def drop(self, key: Key) -> None:
        """The scheduler has forgotten the sequence: end its pull."""
        pull = self._pulls.pop(key, None)
        if pull is not None:
            self._abort(pull)

    def close(self) -> None:
        """End all pulls without a word: their connections are closed next, and nothing may be tried again."""
        pulls, self._pulls = self._pulls, {}
        for pull in pulls.values():
            self._finish(pull)

    def tick(self, moment: float) -> None:
        """Close connections on which a pull has stalled or an Abort was not answered; others are fetched again."""
        for link in list(self._links.values()):
            for pull in list(link.pulls.values()):
                if self._has_stalled(pull, moment):
                    self._metrics.transfer_failures.labels("stall").inc()
                    link.connection.abort()
                    break

    def _has_stalled(self, pull: _Pull, moment: float) -> bool:
        if pull.aborting_since is not None:
            return moment - pull.aborting_since > ABORT_TIMEOUT
        waiting_for_slot = pull.incoming is not None and pull.incoming.num_posted == 0
        return not waiting_for_slot and moment - pull.heard > self._policy.pull_stall_s

    def _abort(self, pull: _Pull) -> None:
        """Tell P to stop; the pull stays on its link until P has answered."""
        self._finish(pull)
        if pull.link is not None and pull.pull_id in pull.link.pulls and pull.aborting_since is None:
            pull.aborting_since = now()
            self._send(pull.link, Abort(pull.pull_id))

    def _retry(self, pull: _Pull, reason: EndReason, detail: str) -> None:
        """A pull has failed: open it anew once, then give up."""
        self._abort(pull)
        if pull.tries >= MAX_TRIES:
            self._give_up(pull, reason, detail)
            return
        again = _Pull(pull.sequence, pull.address, tries=pull.tries)
        self._pulls[pull.key] = again
        self._tasks.spawn(self._open(again), "open")

    def _finish(self, pull: _Pull) -> None:
        """No more frames are wanted. Posted slots come back by themselves, when P's pads or the end complete them."""
        if pull.incoming is not None:
            pull.incoming.over = True
        for slot in pull.posted.values():
            self._slots.release(slot)
        pull.posted.clear()

    def _give_up(self, pull: _Pull, reason: EndReason | None, detail: str) -> None:
        self._finish(pull)
        if self._pulls.get(pull.key) is pull:
            del self._pulls[pull.key]
            self._failed(pull.key, reason, detail)

    def _send(self, link: _Link, message: Flow) -> None:
        link.connection.send_message(self._codec.encode(message))
