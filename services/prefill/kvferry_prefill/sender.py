"""The data plane of a prefill worker: answers Opens, streams KV into open pulls, pads, and hears Acks.

    Open ──> parked (unknown yet, at most 1 s) ──> open ──Fetch──> sending ──Ack──> gone
                                                    │                └─ Abort, drop, connection lost ─> gone
                                                    └── Progress after each step of its sequence

The frames themselves are the pump's (`kvferry.worker.handoff.pump`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import TaskSet, now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.transport.base import Connection
from kvferry.wire.flow import Abort, Aborted, Ack, Credit, Fetch, FetchPart, Flow, FlowCodec, Open, Progress, Unknown
from kvferry.wire.frame import HEADER_BYTES
from kvferry.worker.digests import Digests
from kvferry.worker.handoff.hearing import Hearing
from kvferry.worker.handoff.orders import AbortReason
from kvferry.worker.handoff.outgoing import Outgoing
from kvferry.worker.handoff.pump import Pump
from kvferry.worker.handoff.serving import MAX_CREDITS_HELD, MAX_PULLS, PartServer
from kvferry.worker.handoff.shards import OwnShard
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.parts import Parts
from kvferry_prefill.feeds import Feeds
from kvferry_prefill.pull import Link, Pull
from kvferry_prefill.scheduler import PrefillScheduler
from kvferry_prefill.source import Sources

log = get_logger(__name__)
PARK_S: Final = 1.0
MAX_PARKED: Final = 1024
MAX_GONE: Final = 4096  # attempts whose end an Open that comes too late still hears


class Sender:
    """Serves the pulls of all decode workers. Only the event loop calls it."""

    def __init__(
        self,
        scheduler: PrefillScheduler,
        parts: Parts,
        copy_lane: Lane,
        tasks: TaskSet,
        metrics: WorkerMetrics,
        digests: Digests,
        unpin: Callable[[Sequence], None],
        acknowledged: Callable[[Sequence], None],
    ) -> None:
        runner, slots = parts.runner, parts.slots
        self._scheduler = scheduler
        self._runner = runner
        self._slots = slots
        self._copy_lane = copy_lane
        self._pump = Pump(runner.here, slots, copy_lane, metrics)
        self._sources = Sources(scheduler, runner.kv_format.format_id, unpin)
        own = OwnShard(runner.here.heads)
        self._server = own.server = PartServer(runner.here, slots, copy_lane, tasks, metrics, own.said)
        self._feeds = Feeds((own, *parts.shards), self._sources, self._find, metrics)
        self._tasks = tasks
        self._metrics = metrics
        self._digests = digests
        self._unpin = unpin
        self._acknowledged = acknowledged
        self._codec = FlowCodec()
        self._hearing = Hearing(metrics)
        self._links: dict[Link, None] = {}
        self._by_key: dict[Key, Pull] = {}
        self._parked: list[Pull] = []
        self._gone: dict[Key, AbortReason] = {}
        scheduler.has_open = self.has_open

    def has_open(self, key: Key) -> bool:
        return key in self._by_key

    # -- connections -----------------------------------------------------------------------------------------

    def attach(self, connection: Connection) -> None:
        """Serve a new, authenticated connection."""
        link = Link(connection)
        self._links[link] = None
        connection.on_message(lambda message: self._on_message(link, message))
        connection.on_closed(lambda: self._on_closed(link))

    def _on_message(self, link: Link, payload: memoryview) -> None:
        message = self._hearing.understand(link.connection, payload)
        match message:
            case None:
                return
            case Open():
                self._on_open(link, message)
            case Fetch() | Credit() | Abort() | Ack():
                pull = link.pulls.get(message.pull_id)
                # A pull that P has ended meanwhile: its Aborted is on the way.
                if pull is not None:
                    self._on_pull(pull, message)
                elif not isinstance(message, Fetch):
                    self._server.take(link, message)
            case FetchPart():
                self._server.take(link, message)
            case _:
                self._hearing.distrust(link.connection, "unexpected")

    def _on_closed(self, link: Link) -> None:
        self._links.pop(link, None)
        self._server.closed(link)
        for pull in list(link.pulls.values()):
            self._not_sent(pull, "connection lost")
            self._forget(pull)
            self._scheduler.hold_again(pull.key, now())

    # -- a pull's messages -----------------------------------------------------------------------------------

    def _on_open(self, link: Link, message: Open) -> None:
        pull = Pull(link, message.pull_id, (message.ticket, message.attempt))
        if message.pull_id in link.pulls or len(link.pulls) >= MAX_PULLS:
            self._hearing.distrust(link.connection, "reused_pull")
            return
        sequence = self._scheduler.sequences.get(pull.key)
        if sequence is None:
            if (reason := self._gone.get(pull.key)) is not None:
                self._abort(pull, reason)
                return
            if len(self._parked) >= MAX_PARKED:
                self._unknown(pull)
                return
            pull.parked_until = now() + PARK_S
            self._parked.append(pull)
            link.pulls[pull.pull_id] = pull
            return
        link.pulls[pull.pull_id] = pull
        self._bind(pull, sequence)

    def _find(self, key: Key, pull_id: int) -> Pull | None:
        pull = self._by_key.get(key)
        return None if pull is None or pull.pull_id != pull_id else pull

    def arrived(self, sequence: Sequence) -> None:
        """A request was accepted: an Open may be parked for it."""
        for pull in self._parked:
            if pull.key == sequence.key:
                self._parked.remove(pull)
                self._bind(pull, sequence)
                return

    def tick(self, moment: float) -> None:
        """Refuse Opens that have been parked too long; keep the others informed."""
        for pull in [pull for pull in self._parked if moment >= pull.parked_until]:
            self._unknown(pull)
        for pull in list(self._by_key.values()):
            self._progress(pull)
        for link in list(self._links):
            if link.is_stalled(moment):
                self._metrics.transfer_failures.labels("send_stall").inc()
                link.connection.abort()

    def _bind(self, pull: Pull, sequence: Sequence) -> None:
        older = self._by_key.get(pull.key)
        if older is not None:
            self._abort(older, "superseded")
        pull.sequence = sequence
        self._by_key[pull.key] = pull
        self._progress(pull)

    def _unknown(self, pull: Pull) -> None:
        self._metrics.transfer_failures.labels("unknown_ticket").inc()
        self._forget(pull)
        self._send(pull, Unknown(pull.pull_id))

    def _on_pull(self, pull: Pull, message: Fetch | Credit | Abort | Ack) -> None:
        if pull.ended:
            self._on_ended_pull(pull, message)
            return
        if pull.sequence is None and not isinstance(message, Abort):
            self._refuse(pull, message)
            return
        match message:
            case Fetch():
                self._on_fetch(pull, message)
            case Credit(_, credits, again):
                outgoing = pull.outgoing
                if outgoing is None or outgoing.credits + credits > MAX_CREDITS_HELD or not outgoing.ask_again(again):
                    self._refuse(pull, message)
                    return
                outgoing.credits += credits
                pull.wake.set()
            case Abort():
                self._abort(pull, "asked")
            case Ack():
                self._on_ack(pull, message)

    def _on_ended_pull(self, pull: Pull, message: Fetch | Credit | Abort | Ack) -> None:
        """Credits that crossed P's Aborted, or that it refuses: pad them, for D has a receive posted for each."""
        match message:
            case Fetch(_, from_token, credits) if pull.outgoing is None:
                credits = min(MAX_CREDITS_HELD, credits)
                self._start_pump(
                    pull, pull.sequence, Outgoing(pull.pull_id, from_token, range(0), credits, stopped=True)
                )
            case Credit(_, credits, _) if pull.outgoing is not None:
                pull.outgoing.credits = min(MAX_CREDITS_HELD, pull.outgoing.credits + credits)
                pull.wake.set()
            case Abort() | Ack():
                self._forget(pull, padding=True)

    def _on_fetch(self, pull: Pull, message: Fetch) -> None:
        sequence, from_token = pull.sequence, message.from_token
        assert sequence is not None
        aligned = from_token % sequence.block_size == 0 or from_token == sequence.num_context
        heads = self._runner.heads if message.heads is None else range(*message.heads)
        inside = heads and heads.start in self._runner.here.heads and heads.stop - 1 in self._runner.here.heads
        if pull.outgoing is not None or not aligned or from_token > sequence.num_context or not inside:
            self._refuse(pull, message)
            return
        outgoing = Outgoing(pull.pull_id, from_token, heads, message.credits)
        outgoing.computed(min(sequence.num_computed, sequence.num_context), self._runner.kv_format, self._room)
        if sequence.journal is not None:
            sequence.journal.begin("KV send", now(), first_token=from_token)
        self._start_pump(pull, sequence, outgoing)
        self._feeds.fetched(pull)

    def _start_pump(self, pull: Pull, sequence: Sequence | None, outgoing: Outgoing) -> None:
        pull.outgoing = outgoing
        source = None if sequence is None else self._sources.of(sequence)
        self._tasks.spawn(self._pump.run(pull, outgoing, source), "pump")

    def _on_ack(self, pull: Pull, message: Ack) -> None:
        sequence = pull.sequence
        if sequence is None or pull.outgoing is None or not pull.outgoing.manifest_sent:
            self._refuse(pull, message)
            return
        self._metrics.pulls.labels("sent").inc()
        if sequence.journal is not None:
            sequence.journal.end("KV send", now(), num_frames=pull.outgoing.next_frame)
        self._forget(pull, padding=True)
        if (computed_at := self._sources.computed_at.pop(pull.key, None)) is not None:
            self._metrics.tail_seconds.observe(now() - computed_at)
        if self._digests.enabled:
            self._keep_digests(sequence, pull.outgoing.from_token)
        self._acknowledged(sequence)

    def _keep_digests(self, sequence: Sequence, from_token: int) -> None:
        self._scheduler.memory.pin(sequence)
        digesting = self._digests.take(self._runner, self._copy_lane, sequence, from_token, self._unpin)
        self._tasks.spawn(digesting, "digest")

    # -- what the worker tells -------------------------------------------------------------------------------

    def stepped(self, sequence: Sequence) -> None:
        """A step of this sequence has ended."""
        pull = self._by_key.get(sequence.key)
        if sequence.state == "held":
            self._sources.computed_at[sequence.key] = now()
        if pull is None:
            return
        if pull.outgoing is None:
            self._progress(pull)
            return
        pull.outgoing.computed(sequence.num_computed, self._runner.kv_format, self._room)
        pull.wake.set()
        self._feeds.stepped(pull)

    def drop(self, key: Key, reason: AbortReason) -> None:
        """The scheduler gave the sequence up: end its pull."""
        self._sources.computed_at.pop(key, None)
        self._gone[key] = reason
        if len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
        pull = self._by_key.get(key)
        if pull is not None:
            self._abort(pull, reason)

    @property
    def _room(self) -> int:
        return self._slots.slot_bytes - HEADER_BYTES

    def _progress(self, pull: Pull) -> None:
        sequence = pull.sequence
        if sequence is None:
            return
        # D would reserve memory in vain for one that is only scored.
        holds = sequence.state in ("computing", "held") and sequence.draws
        expected = self._scheduler.expected_s(sequence)
        self._send(pull, Progress(pull.pull_id, holds, sequence.num_computed, sequence.num_context, expected))

    # -- ends ------------------------------------------------------------------------------------------------

    def _refuse(self, pull: Pull, message: Fetch | Credit | Ack) -> None:
        """The peer broke the protocol on this pull."""
        self._metrics.wire_errors.labels("data", "refused").inc()
        self._abort(pull, "refused")
        self._on_ended_pull(pull, message)
        if pull.sequence is not None:
            self._scheduler.hold_again(pull.key, now())

    def _not_sent(self, pull: Pull, why: str) -> None:
        if pull.sequence is not None and pull.sequence.journal is not None:
            pull.sequence.journal.end("KV send", now(), aborted=why)

    def _abort(self, pull: Pull, reason: AbortReason) -> None:
        self._not_sent(pull, reason)
        self._feeds.stop(pull, reason)
        self._forget(pull, padding=True)
        if reason != "asked":
            pull.ended = True
            pull.link.pulls[pull.pull_id] = pull
        last = pull.outgoing.next_frame if pull.outgoing else 0
        self._send(pull, Aborted(pull.pull_id, last, reason))
        if reason == "asked":
            self._scheduler.hold_again(pull.key, now())

    def _forget(self, pull: Pull, padding: bool = False) -> None:
        """Take the pull off all tables. With `padding` its pump first uses up the credits that it has."""
        self._feeds.stop(pull, "cancelled")
        pull.link.pulls.pop(pull.pull_id, None)
        if pull in self._parked:
            self._parked.remove(pull)
        if self._by_key.get(pull.key) is pull:
            del self._by_key[pull.key]
        if pull.outgoing is not None:
            pull.outgoing.stopped = True
            if not padding:
                pull.outgoing.credits = 0
            pull.wake.set()

    def _send(self, pull: Pull, message: Flow) -> None:
        pull.link.connection.send_message(self._codec.encode(message))
