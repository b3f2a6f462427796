"""A real receiver of OTLP over HTTP: decodes what a collector would get, and keeps it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1 import trace_pb2

from kvferry.trace.span import Event, Span
from kvferry.wire.work import TraceContext

KINDS: dict[int, Any] = {
    trace_pb2.Span.SPAN_KIND_INTERNAL: "internal",
    trace_pb2.Span.SPAN_KIND_SERVER: "server",
    trace_pb2.Span.SPAN_KIND_CLIENT: "client",
}


@dataclass(frozen=True)
class Received:
    """A span, and the process that it came from."""

    span: Span
    resource: dict[str, Any]


class OtlpReceiver:
    """On a free port of the loopback device. `status` is what it answers with; it keeps nothing unless that is 200."""

    def __init__(self) -> None:
        self.status = 200
        self.received: list[Received] = []
        self.num_posts = 0
        self.headers: list[dict[str, str]] = []
        self._changed = threading.Condition()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.status if self.path == "/v1/traces" else 404
                receiver._take(body if status == 200 else None, dict(self.headers))
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()

    @property
    def spans(self) -> list[Span]:
        return [item.span for item in self.received]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 60.0) -> None:
        """Until what was received fulfils it."""
        with self._changed:
            assert self._changed.wait_for(condition, seconds), f"not received: {[span.name for span in self.spans]}"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _take(self, body: bytes | None, headers: dict[str, str]) -> None:
        with self._changed:
            self.num_posts += 1
            self.headers.append(headers)
            if body is not None:
                self.received += decoded(ExportTraceServiceRequest.FromString(body))
            self._changed.notify_all()


def decoded(request: ExportTraceServiceRequest) -> list[Received]:
    return [
        Received(_span(span), _attributes(group.resource.attributes))
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def _span(span: trace_pb2.Span) -> Span:
    return Span(
        span.name,
        TraceContext(span.trace_id, span.span_id, span.trace_state),
        span.parent_span_id or None,
        KINDS[span.kind],
        _seconds(span.start_time_unix_nano),
        _seconds(span.end_time_unix_nano),
        _attributes(span.attributes),
        tuple(Event(event.name, _seconds(event.time_unix_nano)) for event in span.events),
        span.status.message if span.status.code == trace_pb2.Status.STATUS_CODE_ERROR else None,
    )


def _seconds(nanoseconds: int) -> float:
    """To the microsecond: a float of today's Unix time has few digits more."""
    return round(nanoseconds / 1e9, 6)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
