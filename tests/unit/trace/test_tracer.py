"""Spans on their way out: batches, bounds, losses that are counted. On a virtual clock."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest
from virtual_loop import VirtualLoop

from kvferry.lane import Lane, ThreadLane
from kvferry.metrics import Metrics
from kvferry.runtime import SeededRuntime, SystemRuntime, now
from kvferry.trace.open_span import OpenSpan
from kvferry.trace.span import MemoryExporter, Span
from kvferry.trace.tracer import EXPORT_DELAY_S, FLUSH_S, MAX_EXPORTED_SPANS, MAX_WAITING_SPANS, Tracer
from kvferry.wire.work import TraceContext

HEADERS = [(b"traceparent", b"00-" + b"11" * 16 + b"-" + b"22" * 8 + b"-01")]


class Outlet:
    """A tracer, its twin of an exporter, and its counts."""

    def __init__(self, sample_ratio: float = 1.0, seed: int = 1) -> None:
        self.metrics = Metrics()
        self.exporter = MemoryExporter()
        counter = self.metrics.counter("kvferry_span", "Spans.", ("outcome",))
        self.tracer = Tracer(SeededRuntime(seed), self.exporter, counter, sample_ratio)

    def request(self, headers: Sequence[tuple[bytes, bytes]] = ()) -> OpenSpan | None:
        return self.tracer.begin("request", now(), headers)

    def tell(self, count: int) -> None:
        for _ in range(count):
            span = self.request()
            assert span is not None
            span.end(now())

    def counted(self, outcome: str) -> float:
        return self.metrics.value("kvferry_span_total", outcome=outcome)


def virtually(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    def run() -> None:
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(300.0)) as runner:
            runner.run(test())  # type: ignore[arg-type]

    run.__name__ = test.__name__
    return run


@virtually
async def test_a_few_spans_go_out_soon_and_together() -> None:
    outlet = Outlet()
    outlet.tell(3)
    await asyncio.sleep(EXPORT_DELAY_S * 0.9)
    assert not outlet.exporter.spans
    await asyncio.sleep(EXPORT_DELAY_S * 0.2)
    assert len(outlet.exporter.spans) == outlet.counted("sent") == 3


@virtually
async def test_a_full_batch_goes_out_at_once() -> None:
    outlet = Outlet()
    outlet.tell(MAX_EXPORTED_SPANS)
    await asyncio.sleep(0.01)
    assert len(outlet.exporter.spans) == MAX_EXPORTED_SPANS


@virtually
async def test_spans_that_the_exporter_loses_are_counted() -> None:
    outlet = Outlet()
    outlet.exporter.broken = True
    outlet.tell(2)
    await asyncio.sleep(2 * EXPORT_DELAY_S)
    assert (outlet.counted("failed"), outlet.counted("sent")) == (2, 0)
    outlet.exporter.broken = False
    outlet.tell(1)
    await asyncio.sleep(2 * EXPORT_DELAY_S)
    assert outlet.counted("sent") == len(outlet.exporter.spans) == 1


async def test_while_an_export_takes_long_the_queue_is_bounded_and_the_rest_is_dropped() -> None:
    release = asyncio.Event()
    begun = asyncio.Event()
    loop = asyncio.get_running_loop()

    class Slow(MemoryExporter):
        def export(self, spans: Sequence[Span]) -> bool:
            loop.call_soon_threadsafe(begun.set)
            asyncio.run_coroutine_threadsafe(release.wait(), loop).result()
            return super().export(spans)

    class Threads(SystemRuntime):
        def lane(self, name: str, nice: int = 0, *, daemon: bool = False) -> Lane:
            return ThreadLane(name)

    metrics, exporter = Metrics(), Slow()
    tracer = Tracer(Threads(), exporter, metrics.counter("kvferry_span", "Spans.", ("outcome",)))

    def tell(count: int) -> None:
        for _ in range(count):
            span = tracer.begin("request", now(), ())
            assert span is not None
            span.end(now())

    tell(MAX_EXPORTED_SPANS)
    await begun.wait()
    tell(MAX_WAITING_SPANS + 7)
    assert metrics.value("kvferry_span_total", outcome="dropped") == 7
    release.set()
    await tracer.close()
    assert exporter.closed
    assert len(exporter.spans) == metrics.value("kvferry_span_total", outcome="sent")
    assert len(exporter.spans) == MAX_EXPORTED_SPANS + MAX_WAITING_SPANS


@virtually
async def test_what_waits_at_the_end_is_exported_and_nothing_after_it() -> None:
    outlet = Outlet()
    late = outlet.request()
    assert late is not None
    outlet.tell(MAX_EXPORTED_SPANS // 2)
    began = now()
    await outlet.tracer.close()
    assert now() - began < FLUSH_S
    assert len(outlet.exporter.spans) == MAX_EXPORTED_SPANS // 2
    late.end(now())
    assert outlet.counted("dropped") == 1
    assert outlet.exporter.closed


@virtually
async def test_a_span_has_unix_time_and_the_duration_of_the_loops_clock() -> None:
    outlet = Outlet()
    span = outlet.tracer.follow(TraceContext(bytes(15) + b"\1", b"\2" * 8, "a=b"), "prefill", now())
    await asyncio.sleep(0.25)
    child = span.child("queue", now())
    child.event("here", now())
    await asyncio.sleep(0.5)
    child.end(now())
    span.end(now(), "deadline")
    span.end(now() + 9)  # without effect
    await asyncio.sleep(2 * EXPORT_DELAY_S)
    inner, outer = outlet.exporter.spans
    assert outer.ended - outer.began == pytest.approx(0.75)
    assert inner.ended - inner.began == pytest.approx(0.5)
    assert inner.events[0].at == inner.began == pytest.approx(outer.began + 0.25)
    assert (outer.parent, outer.context.state, outer.kind) == (b"\2" * 8, "a=b", "server")
    assert (inner.parent, inner.context.state, inner.kind) == (outer.context.span_id, "a=b", "internal")
    assert inner.context.trace_id == outer.context.trace_id == bytes(15) + b"\1"
    assert (inner.error, outer.error) == (None, "deadline")


@virtually
async def test_the_client_decides_about_its_own_trace() -> None:
    outlet = Outlet(sample_ratio=0.0)
    span = outlet.request(HEADERS)
    assert span is not None
    assert span.context.trace_id == b"\x11" * 16
    assert outlet.request() is None
    (name, value) = HEADERS[0]
    assert Outlet().request([(name, value[:-1] + b"0")]) is None


@virtually
async def test_of_other_requests_a_share_is_traced() -> None:
    outlet = Outlet(sample_ratio=0.25)
    traced = sum(outlet.request() is not None for _ in range(2000))
    assert 400 < traced < 600


@virtually
async def test_ids_come_from_the_runtime_alone() -> None:
    first, again, other = ([Outlet(seed=seed).request() for _ in range(3)] for seed in (1, 1, 2))
    assert [span and span.context for span in first] == [span and span.context for span in again]
    assert {span and span.context for span in first}.isdisjoint({span and span.context for span in other})
