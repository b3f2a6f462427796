"""What pulls took: for the metrics, for their requests' traces, and to know how fast links are."""

from __future__ import annotations

from collections import deque

from kvferry.runtime import now
from kvferry.wire.beats import MAX_RECENT_PULLS, PullTime
from kvferry.worker.handoff.landing import Landing
from kvferry.worker.handoff.timing import TransferRate
from kvferry.worker.metrics import WorkerMetrics
from kvferry_decode.pull import Pull


class PullTimes:
    """Of one worker. `rate`: of all its links."""

    def __init__(self, metrics: WorkerMetrics, token_bytes: int) -> None:
        """`token_bytes`: KV of one token."""
        self.rate = TransferRate()
        self._metrics = metrics
        self._token_bytes = token_bytes
        self._recent: deque[PullTime] = deque(maxlen=MAX_RECENT_PULLS)

    def received(self, pull: Pull, landing: Landing) -> None:
        """All of a pull has come, and is right."""
        incoming, seconds = landing.incoming, now() - pull.began
        # Where the pace held a pull back, its slowness says nothing.
        computed_at = None if landing.held_back else pull.computed_at
        prefill_s = seconds if computed_at is None else max(0.0, computed_at - pull.began)
        num_bytes = (pull.sequence.num_context - incoming.from_token) * self._token_bytes
        if self.rate.observe(num_bytes, seconds, prefill_s):
            self._recent.append((pull.address.incarnation, num_bytes, seconds))
        self._metrics.pulls.labels("received").inc()
        self._metrics.pull_seconds.observe(seconds)
        if (journal := pull.sequence.journal) is not None:
            journal.end(
                "KV fetch", now(), bytes=num_bytes, num_frames=incoming.num_posted, num_bad_frames=incoming.num_bad,
                held_back=landing.held_back,
            )  # fmt: skip

    def take(self) -> tuple[PullTime, ...]:
        """Pulls since the last call whose time tells the rate of their link; the latest if there were very many."""
        times = tuple(self._recent)
        self._recent.clear()
        return times
