"""The data plane of a decode worker: opens hand-offs, lets their frames land (`landing.py`), gives the verdict.

    open ──Open──> opening ──Progress: due──> (scheduler reserves) ──fetch──> fetching ──whole, verified──> gone
       │              └─ Unknown, Aborted ─> dropped                             ├─ bad frame: asked again
       └─ no connection: once more, then dropped                                 └─ failed: once more, then dropped

A pull that fails once is opened again with a new `pull_id`; the second failure drops the sequence. Slots come
back when their receives complete, whatever has become of the pull.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

from kvferry.errors import TransportError
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.runtime import TaskSet, now
from kvferry.schedule.sequence import Key, Sequence
from kvferry.transport.base import Connection
from kvferry.transport.pool import ConnectionPool
from kvferry.wire.beats import PullTime
from kvferry.wire.flow import Abort, Aborted, Ack, Fetch, Flow, FlowCodec, Open, Progress, Unknown
from kvferry.wire.record import WorkerAddress
from kvferry.wire.tokens import EndReason
from kvferry.worker.digests import Digests
from kvferry.worker.handoff.fetching import CONNECT_TIMEOUT, PartFetcher
from kvferry.worker.handoff.hearing import Hearing
from kvferry.worker.handoff.landing import Dock, Landing, Target
from kvferry.worker.handoff.orders import Lost
from kvferry.worker.handoff.pace import Pace
from kvferry.worker.handoff.parts import Part, heads_of_shards, parts_of
from kvferry.worker.handoff.shards import OwnShard
from kvferry.worker.handoff.timing import is_due
from kvferry.worker.metrics import WorkerMetrics
from kvferry.worker.parts import Parts
from kvferry_decode.others import OtherParts, Watcher
from kvferry_decode.pull import Link, Pull
from kvferry_decode.pull_times import PullTimes
from kvferry_decode.verdict import Right, Wrong, judge

log = get_logger(__name__)
MAX_TRIES: Final = 2
U32_MASK: Final = (1 << 32) - 1

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


@dataclass(frozen=True, slots=True)
class PullPolicy:
    pull_stall_s: float
    reserve_lead_s: float
    share: float  # of a decode step that landing may take


class Receiver(ABC):
    """Whose sequences the pulls are of."""

    @abstractmethod
    def pin(self, sequence: Sequence) -> None:
        """A copy of its blocks begins."""

    @abstractmethod
    def unpin(self, sequence: Sequence) -> None:
        """It has ended."""

    @abstractmethod
    def due(self, key: Key) -> None:
        """P will soon have computed all: reserve blocks, then `Puller.fetch`."""

    @abstractmethod
    def fetched(self, sequence: Sequence, first: Right, cached_tokens: int) -> None:
        """The sequence may run. `cached_tokens`: of its prompt, at P."""

    @abstractmethod
    def failed(self, key: Key, reason: EndReason | None, detail: str) -> None:
        """Its pull is given up. Without a reason the gateway knows already."""


class Puller:
    """All pulls of this worker. Only the event loop calls it."""

    def __init__(
        self,
        connections: ConnectionPool,
        parts: Parts,
        copy_lane: Lane,
        tasks: TaskSet,
        metrics: WorkerMetrics,
        digests: Digests,
        policy: PullPolicy,
        receiver: Receiver,
    ) -> None:
        runner, here = parts.runner, parts.runner.here
        self._connections = connections
        self._runner = runner
        self._copy_lane = copy_lane
        self._tasks = tasks
        self._metrics = metrics
        self._digests = digests
        self._policy = policy
        self._receiver = receiver
        self._codec = FlowCodec()
        self._hearing = Hearing(metrics)
        self._times = PullTimes(metrics, runner.kv_format.token_bytes)
        self._pace = Pace(policy.share, parts.slots.slot_bytes, self._times.rate)
        self._dock = Dock(here, parts.slots, copy_lane, metrics, self._codec, self._pace)
        own = OwnShard(here.heads)
        self._fetcher = own.fetcher = PartFetcher(connections, self._dock, tasks, own.said)
        self._shard_heads = (own.heads, *(shard.heads for shard in parts.shards))
        self._other_parts = OtherParts((own, *parts.shards), metrics, receiver.pin, receiver.unpin)
        self._links: dict[Connection, Link] = {}
        self._pulls: dict[Key, Pull] = {}
        self._last_pull_id = parts.incarnation & U32_MASK  # no two workers, nor two lives of one, use the same numbers

    def __len__(self) -> int:
        return len(self._pulls)

    def take_times(self) -> tuple[PullTime, ...]:
        """Pulls since the last call whose time tells the rate of their link; the latest if there were very many."""
        return self._times.take()

    def progress(self, key: Key) -> tuple[int, int]:
        """Bytes of KV that have come for a sequence, and of all that are fetched: of the part between the leaders, for
        the others go beside it."""
        pull = self._pulls.get(key)
        if pull is None or pull.landing is None:
            return 0, 0
        incoming = pull.landing.incoming
        return incoming.num_bytes, incoming.num_bytes + incoming.missing_bytes

    # -- opening ---------------------------------------------------------------------------------------------

    def parts(self, address: WorkerAddress) -> tuple[Part, ...] | None:
        """What this worker's shards pull from those of a P. None if the address can't be that of one with our heads."""
        peers = heads_of_shards(address, self._runner.kv_format.all_heads)
        return None if peers is None else parts_of(self._shard_heads, peers)

    def open(self, sequence: Sequence, address: WorkerAddress, parts: tuple[Part, ...]) -> None:
        """Begin the hand-off of an accepted request."""
        pull = self._pulls[sequence.key] = Pull(sequence, address, parts)
        self._tasks.spawn(self._open(pull), "open")

    async def _open(self, pull: Pull) -> None:
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
            link = self._links[connection] = Link(connection)
            self._attach(link)
        pull.pull_id = self._last_pull_id = (self._last_pull_id + 1) & U32_MASK
        pull.link = link
        pull.heard = now()
        link.pulls[pull.pull_id] = pull
        ticket, attempt = pull.key
        self._send(link, Open(pull.pull_id, ticket, attempt))

    def _attach(self, link: Link) -> None:
        link.connection.on_message(lambda payload: self._on_message(link, payload))
        link.connection.on_closed(lambda: self._on_closed(link))

    def _on_message(self, link: Link, payload: memoryview) -> None:
        message = self._hearing.understand(link.connection, payload)
        if message is None:
            return
        if not isinstance(message, Progress | Unknown | Aborted):
            self._hearing.distrust(link.connection, "unexpected")
            return
        pull = link.pulls.get(message.pull_id)
        if pull is None:
            return  # ended on this side already
        complete = isinstance(message, Progress) and message.num_computed >= message.num_tokens
        if complete and pull.computed_at is None:
            pull.computed_at = now()
        if not complete or pull.landing is None:
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

    def _on_progress(self, pull: Pull, progress: Progress) -> None:
        if pull.landing is not None or not self._is_current(pull):
            return
        pull.holds_memory = progress.holds_memory
        if pull.sequence.state == "fetching":
            self.fetch(pull.sequence)  # a second try: the blocks are there already
        elif self._is_due(pull, progress):
            self._receiver.due(pull.key)

    def _is_current(self, pull: Pull) -> bool:
        return self._pulls.get(pull.key) is pull

    def _is_due(self, pull: Pull, progress: Progress) -> bool:
        num_bytes = self._runner.kv_format.token_bytes * pull.sequence.num_context
        return is_due(progress, self._pace.seconds(num_bytes), self._policy.reserve_lead_s)

    def _on_closed(self, link: Link) -> None:
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
        if not pull.holds_memory:
            return  # it has been opened anew meanwhile: P's next Progress fetches
        pull.began = pull.heard = now()
        if sequence.journal is not None:
            sequence.journal.end("queue", pull.began)
            sequence.journal.begin("KV fetch", pull.began, first_token=sequence.cached_tokens, tries=pull.tries)
        heads = pull.parts[0].heads
        target = Target(
            pull.pull_id,
            sequence.cached_tokens,
            sequence.num_context,
            heads,
            sequence.block_table.copy(),
            sequence.work.request_id,
            pin=functools.partial(self._receiver.pin, sequence),
            unpin=functools.partial(self._receiver.unpin, sequence),
        )
        pull.landing = Landing(
            self._dock,
            pull.link.connection,
            target,
            fetch=functools.partial(
                Fetch, target.pull_id, target.from_token, heads=(heads.start, heads.stop) if pull.parts[1:] else None
            ),
            whole=functools.partial(self._landed, pull),
            failed=functools.partial(self._spoiled, pull),
        )
        self._tasks.spawn(self._start(pull, pull.landing), "fetch")

    async def _start(self, pull: Pull, landing: Landing) -> None:
        """The leaders' part has its first slot before any other: these wait for its Fetch, and would hold all slots."""
        await landing.start()
        if not pull.parts[1:] or landing.incoming.over or not landing.incoming.num_posted:
            return
        watcher = Watcher(
            alive=functools.partial(self._alive, pull),
            landed=functools.partial(self._landed, pull),
            lost=functools.partial(self._part_lost, pull),
        )
        pull.others = self._other_parts.fetch(pull.pull_id, pull.sequence, pull.address, pull.parts[1:], watcher)

    def begin_step(self, step_s: float | None) -> None:
        """A step of about `step_s` begins that streams wait for; None: no stream does."""
        self._pace.begin_step(step_s)
        for pull in self._pulls.values():  # the oldest first
            if pull.landing is not None:
                pull.landing.ask_for_more()
        self._fetcher.ask_for_more()

    def _alive(self, pull: Pull) -> None:
        pull.heard = now()

    def _landed(self, pull: Pull) -> None:
        """A part has come. The verdict is on all of them."""
        if pull.landing is not None and pull.landing.incoming.whole and pull.others.whole:
            self._judge(pull, pull.landing)

    def _part_lost(self, pull: Pull, word: Lost) -> None:
        self._metrics.transfer_failures.labels("part").inc()
        self._retry(pull, word.reason, word.detail)

    def _judge(self, pull: Pull, landing: Landing) -> None:
        """All has come."""
        verdict = judge(pull.sequence, self._runner.kv_format.format_id, landing.incoming, pull.others.incoming)
        if isinstance(verdict, Wrong):
            self._metrics.transfer_failures.labels(verdict.fault).inc()
            self._spoiled(pull, verdict.fault)
            return
        link, sequence, manifest = pull.link, pull.sequence, landing.incoming.manifest
        assert link is not None
        assert manifest is not None
        landing.finish()
        self._other_parts.settle(pull.others, right=True)
        self._send(link, Ack(pull.pull_id))
        self._times.received(pull, landing)
        link.pulls.pop(pull.pull_id, None)
        del self._pulls[pull.key]
        if self._digests.enabled:
            self._keep_digests(sequence, landing.incoming.from_token)
        self._receiver.fetched(sequence, verdict, manifest.cached_tokens)

    def _spoiled(self, pull: Pull, detail: str) -> None:
        self._retry(pull, "transfer_failed", detail)

    def _keep_digests(self, sequence: Sequence, from_token: int) -> None:
        self._receiver.pin(sequence)
        digesting = self._digests.take(self._runner, self._copy_lane, sequence, from_token, self._receiver.unpin)
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
                if pull.has_stalled(moment, self._policy.pull_stall_s):
                    self._metrics.transfer_failures.labels("stall").inc()
                    link.connection.abort()
                    break
        self._fetcher.tick(moment)

    def _abort(self, pull: Pull) -> None:
        """Tell P to stop; the pull stays on its link until P has answered."""
        self._finish(pull)
        if pull.link is not None and pull.pull_id in pull.link.pulls and pull.aborting_since is None:
            pull.aborting_since = now()
            self._send(pull.link, Abort(pull.pull_id))

    def _retry(self, pull: Pull, reason: EndReason, detail: str) -> None:
        """A pull has failed: open it anew once, then give up."""
        self._abort(pull)
        if (journal := pull.sequence.journal) is not None:
            journal.end("KV fetch", now(), detail)
        if pull.tries >= MAX_TRIES:
            self._give_up(pull, reason, detail)
            return
        again = Pull(pull.sequence, pull.address, pull.parts, tries=pull.tries)
        self._pulls[pull.key] = again
        self._tasks.spawn(self._open(again), "open")

    def _give_up(self, pull: Pull, reason: EndReason | None, detail: str) -> None:
        self._finish(pull)
        if self._pulls.get(pull.key) is pull:
            del self._pulls[pull.key]
            self._receiver.failed(pull.key, reason, detail)

    def _send(self, link: Link, message: Flow) -> None:
        link.connection.send_message(self._codec.encode(message))

    def _finish(self, pull: Pull) -> None:
        if pull.landing is not None:
            pull.landing.finish()
        self._other_parts.settle(pull.others, right=False)
