"""Makes spans and hands them on: from the event loop to a bounded queue, from there on a lane to the exporter.

Instants are those of the event loop's clock, as everywhere; a span's become Unix time when it ends, by how far the two
clocks are apart at that moment. So its duration is exact, to the loop's millisecond, whatever is done to the wall
clock meanwhile; only between processes do spans depend on how well their wall clocks agree.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable
from typing import Final

from prometheus_client import Counter

from kvferry.runtime import Runtime, now
from kvferry.trace.context import caller_of
from kvferry.trace.open_span import OpenSpan, SpanBook
from kvferry.trace.span import Span, SpanExporter
from kvferry.wire.work import TraceContext

MAX_WAITING_SPANS: Final = 4096  # not exported yet; one more is dropped
MAX_EXPORTED_SPANS: Final = 256  # at once
EXPORT_DELAY_S: Final = 1.0
FLUSH_S: Final = 1.0  # at the end of the process, which a collector that hangs holds up for no longer
EXPORTER_NICE: Final = 5
_HALF: Final = 8  # bytes of a trace id that sampling by ratio looks at


class Tracer(SpanBook):
    """One process's. Only the event loop calls it."""

    def __init__(self, runtime: Runtime, exporter: SpanExporter, counted: Counter, sample_ratio: float = 1.0) -> None:
        """`counted`: spans by `outcome`. `sample_ratio`: of traces that begin here; a caller decides about its own."""
        self._runtime = runtime
        self._exporter = exporter
        self._lane = runtime.lane("spans", nice=EXPORTER_NICE, daemon=True)
        self._sent, self._failed, self._dropped = map(counted.labels, ("sent", "failed", "dropped"))
        self._sample_below = round(sample_ratio * (1 << 8 * _HALF))
        self._waiting: deque[Span] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._exporting: asyncio.Future[bool] | None = None
        self._closed = False

    def begin(self, name: str, moment: float, headers: Iterable[tuple[bytes, bytes]]) -> OpenSpan | None:
        """The span of a request, with these headers. None: its trace is not recorded."""
        caller = caller_of(headers)
        if caller is not None:
            return self.follow(caller.context, name, moment) if caller.sampled else None
        trace_id = self._runtime.random_bytes(16)
        # As OpenTelemetry's sampler by ratio: who has the same ratio decides the same.
        if int.from_bytes(trace_id[-_HALF:]) >= self._sample_below:
            return None
        return OpenSpan(self, name, TraceContext(trace_id, self.new_span_id()), None, moment, "server")

    def follow(self, parent: TraceContext, name: str, moment: float) -> OpenSpan:
        """The first span here of a trace that comes from another process."""
        return OpenSpan(self, name, self.child_of(parent), parent.span_id, moment, "server")

    def child_of(self, parent: TraceContext) -> TraceContext:
        return TraceContext(parent.trace_id, self.new_span_id(), parent.state)

    def new_span_id(self) -> bytes:
        return self._runtime.random_bytes(8)

    def unix_offset(self) -> float:
        """What makes Unix seconds of an instant of the loop's clock."""
        return self._runtime.wall_clock() - now()

    def tell(self, span: Span) -> None:
        """It has ended."""
        if self._closed or len(self._waiting) >= MAX_WAITING_SPANS:
            self._dropped.inc()
            return
        self._waiting.append(span)
        self._arrange()

    async def close(self) -> None:
        """Export what waits, for as long as `FLUSH_S`. Whoever ends a span later loses it."""
        self._closed = True
        deadline = now() + FLUSH_S
        while (self._waiting or self._exporting) and now() < deadline:
            if self._exporting is None:
                self._export()
            assert self._exporting is not None
            await asyncio.wait((self._exporting,), timeout=deadline - now())
        if self._timer is not None:
            self._timer.cancel()
        if self._exporting is not None:
            self._exporting.cancel()
        self._dropped.inc(len(self._waiting))
        self._waiting.clear()
        self._exporter.close()
        self._lane.close()

    def _arrange(self) -> None:
        """Export a full batch at once, a smaller one soon; one at a time."""
        if self._exporting is not None or not self._waiting:
            return
        if len(self._waiting) >= MAX_EXPORTED_SPANS:
            self._export()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(EXPORT_DELAY_S, self._export)

    def _export(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_EXPORTED_SPANS))]
        self._exporting = self._lane.run(self._exporter.export, batch)
        self._exporting.add_done_callback(lambda done: self._exported(len(batch), done))

    def _exported(self, num_spans: int, done: asyncio.Future[bool]) -> None:
        self._exporting = None
        (self._sent if not done.cancelled() and done.result() else self._failed).inc(num_spans)
        if not self._closed:
            self._arrange()
