"""The parts of this worker's pulls that are sent by a shard of it to a shard of D, but for the one between the leaders.

    Asked ──> waits for D's Fetch ──> served ──> told to stop, or D has it all ──Served──> gone
                └── D's shard has given up ──Served──> gone

The sequence is pinned from Serve until the shard has said Served.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from kvferry.schedule.sequence import Key
from kvferry.worker.handoff.orders import AbortReason, Asked, Computed, Finish, Serve, Served, Stop
from kvferry.worker.handoff.shards import LandWord, ServeWord, Shard
from kvferry.worker.metrics import WorkerMetrics
from kvferry_prefill.pull import Feed, Pull
from kvferry_prefill.source import Sources


class Feeds:
    """Only the event loop calls it."""

    def __init__(
        self,
        shards: Sequence[Shard],
        sources: Sources,
        find: Callable[[Key, int], Pull | None],
        metrics: WorkerMetrics,
    ) -> None:
        """`find`: a live pull by its request and number."""
        self._sources = sources
        self._find = find
        self._metrics = metrics
        self._feeds: dict[tuple[int, int], Feed] = {}  # by the shard's place and its number of the part
        for place, shard in enumerate(shards):
            shard.on_word(functools.partial(self._hear, place, shard))

    def _hear(self, place: int, shard: Shard, word: ServeWord | LandWord) -> None:
        match word:
            case Asked():
                self._on_asked(place, shard, word)
            case Served(number, num_bytes):
                feed = self._feeds.pop((place, number))
                feed.over = True
                if shard.is_remote:
                    self._metrics.kv_bytes.labels("sent").inc(num_bytes)
                if feed.source is not None:
                    feed.source.unpin()

    def _on_asked(self, place: int, shard: Shard, asked: Asked) -> None:
        feed = self._feeds[place, asked.part] = Feed(shard, asked.part, asked.from_token)
        pull = self._find((asked.ticket, asked.attempt), asked.pull_id)
        if pull is None:
            shard.tell(Stop(feed.number, "refused"))
            return
        pull.feeds.append(feed)
        self._serve(pull, feed)

    def fetched(self, pull: Pull) -> None:
        """D's leader has asked for its own part: others may have come before."""
        for feed in pull.feeds:
            self._serve(pull, feed)

    def _serve(self, pull: Pull, feed: Feed) -> None:
        sequence, outgoing = pull.sequence, pull.outgoing
        if feed.over or sequence is None or outgoing is None:
            return  # `fetched` will come, or has come too late
        source = self._sources.of(sequence)
        table = source.block_table
        if feed.from_token != outgoing.from_token or table is None:
            feed.shard.tell(Stop(feed.number, "refused"))
            return
        feed.source = source
        source.pin()
        num_computed = min(sequence.num_computed, sequence.num_context)
        blocks = np.ascontiguousarray(table, "<i4").tobytes()
        feed.shard.tell(Serve(feed.number, blocks, num_computed, sequence.work.request_id))
        self._finish(feed)

    def stepped(self, pull: Pull) -> None:
        """A step of the pull's sequence has ended."""
        assert pull.sequence is not None
        for feed in pull.feeds:
            if feed.source is not None:
                feed.shard.tell(Computed(feed.number, min(pull.sequence.num_computed, pull.sequence.num_context)))
                self._finish(feed)

    def _finish(self, feed: Feed) -> None:
        if feed.source is not None and feed.source.finished and not feed.finished:
            feed.finished = True
            feed.shard.tell(Finish(feed.number, feed.source.manifest(feed.from_token, 0)))

    def stop(self, pull: Pull, reason: AbortReason) -> None:
        """The pull is over."""
        feeds, pull.feeds = pull.feeds, []
        for feed in feeds:
            feed.shard.tell(Stop(feed.number, reason))
