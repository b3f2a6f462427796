"""Spans to an OpenTelemetry collector, by OTLP over HTTP. The only file that imports OpenTelemetry.

Its exporter reads the standard variables for all but the address: OTEL_EXPORTER_OTLP_HEADERS (credentials),
…_TIMEOUT, …_COMPRESSION, …_CERTIFICATE; the resource takes OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from kvferry.log import get_logger
from kvferry.trace.span import Span, SpanExporter
from kvferry.wire.work import TraceContext

TRACES_PATH: Final = "/v1/traces"
_KINDS: Final = {"internal": SpanKind.INTERNAL, "server": SpanKind.SERVER, "client": SpanKind.CLIENT}
_OK: Final = Status(StatusCode.UNSET)

log = get_logger(__name__)


class OtlpExporter(SpanExporter):
    """To one collector. A batch that fails is tried again for up to the timeout (10 s), then lost."""

    def __init__(self, endpoint: str, resource: Mapping[str, str], version: str) -> None:
        """`endpoint`: the collector's base URL, or that of its traces. `resource`: what the process is."""
        base = endpoint.rstrip("/")
        self._exporter = OTLPSpanExporter(endpoint=base if base.endswith(TRACES_PATH) else base + TRACES_PATH)
        # The operator's own word about the resource comes last.
        self._resource = Resource(dict(resource)).merge(OTELResourceDetector().detect())
        self._scope = InstrumentationScope("kvferry", version)
        self._failing = False
        # It would tell of every try. What an operator needs is said here, once until it has changed.
        logging.getLogger(OTLPSpanExporter.__module__).setLevel(logging.CRITICAL)

    def export(self, spans: Sequence[Span]) -> bool:
        readable = [self._readable(span) for span in spans]
        sent = self._exporter.export(readable) is SpanExportResult.SUCCESS
        if sent == self._failing:
            self._failing = not sent
            if self._failing:
                log.warning("spans are not taken; requests are not affected", num_spans=len(spans))
            else:
                log.info("spans are taken again")
        return sent

    def close(self) -> None:
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _readable(self, span: Span) -> ReadableSpan:
        parent = None if span.parent is None else TraceContext(span.context.trace_id, span.parent, span.context.state)
        return ReadableSpan(
            name=span.name,
            context=_context(span.context),
            parent=None if parent is None else _context(parent, remote=span.kind == "server"),
            resource=self._resource,
            attributes=dict(span.attributes),
            events=[Event(event.name, timestamp=_nanoseconds(event.at)) for event in span.events],
            kind=_KINDS[span.kind],
            status=_OK if span.error is None else Status(StatusCode.ERROR, span.error),
            start_time=_nanoseconds(span.began),
            end_time=_nanoseconds(span.ended),
            instrumentation_scope=self._scope,
        )


def _context(context: TraceContext, *, remote: bool = False) -> SpanContext:
    return SpanContext(
        int.from_bytes(context.trace_id),
        int.from_bytes(context.span_id),
        remote,
        TraceFlags(TraceFlags.SAMPLED),
        TraceState.from_header([context.state]) if context.state else None,
    )


def _nanoseconds(instant: float) -> int:
    return round(instant * 1e9)
