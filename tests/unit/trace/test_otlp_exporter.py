"""The exporter against a receiver that decodes what a collector would get, and against one that fails."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from otlp_receiver import OtlpReceiver

from kvferry.errors import SettingError
from kvferry.log import get_logger, setup_logging
from kvferry.runtime import SeededRuntime
from kvferry.trace.factory import open_exporter
from kvferry.trace.otlp import OtlpExporter
from kvferry.trace.span import Event, Span
from kvferry.trace.tracer import FLUSH_S
from kvferry.wire.work import TraceContext
from kvferry_prefill.settings import PrefillSettings

PATIENCE_S = 60
EXIT_S = 5  # of an interpreter, on a machine that has much to do; the exporter itself would wait for 10
TRACE = bytes(range(16))
ROOT = Span(
    "POST /v1/completions", TraceContext(TRACE, b"\1" * 8, "congo=t61"), b"\7" * 8, "server", 1_700_000_000.25,
    1_700_000_001.5, {"kvferry.stream": True, "kvferry.choices": 3, "share": 0.5, "http.route": "/v1/completions"},
)  # fmt: skip
CHILD = Span(
    "attempt", TraceContext(TRACE, b"\2" * 8, "congo=t61"), b"\1" * 8, "client", 1_700_000_000.5, 1_700_000_001.0, {},
    (Event("first token", 1_700_000_000.75),), "decode_gone",
)  # fmt: skip


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    receiver = OtlpReceiver()
    try:
        yield receiver
    finally:
        receiver.close()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    stream = io.StringIO()
    setup_logging("info", "json", service="prefill", stream=stream)
    monkeypatch.setattr("kvferry.trace.otlp.log", get_logger("test"))  # a logger keeps its first stream
    return stream


def exporter_to(url: str) -> OtlpExporter:
    return OtlpExporter(url, {"service.name": "kvferry-prefill", "service.version": "1"}, "1")


def test_a_collector_gets_the_spans_as_they_are(receiver: OtlpReceiver) -> None:
    exporter = exporter_to(receiver.url)
    assert exporter.export([ROOT, CHILD])
    exporter.close()
    assert receiver.spans == [ROOT, CHILD]
    assert receiver.received[0].resource["service.name"] == "kvferry-prefill"


def test_the_operators_variables_have_the_last_word(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "ferry")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment=test")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=hush")
    exporter = exporter_to(receiver.url + "/v1/traces/")
    assert exporter.export([ROOT])
    exporter.close()
    resource = receiver.received[0].resource
    assert (resource["service.name"], resource["service.version"]) == ("ferry", "1")
    assert resource["deployment.environment"] == "test"
    assert receiver.headers[0]["authorization"] == "hush"


def test_a_collector_that_refuses_costs_the_spans_and_one_log_line(receiver: OtlpReceiver, logged: io.StringIO) -> None:
    exporter = exporter_to(receiver.url)
    receiver.status = 400
    assert not exporter.export([ROOT])
    assert not exporter.export([CHILD])
    receiver.status = 200
    assert exporter.export([CHILD])
    exporter.close()
    assert receiver.spans == [CHILD]
    lines = [json.loads(line) for line in logged.getvalue().splitlines()]
    assert [line["level"] for line in lines] == ["warning", "info"]


def test_a_collector_that_is_not_there_is_given_up_in_time(
    logged: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    exporter = exporter_to("http://127.0.0.1:9")  # nobody listens there
    assert not exporter.export([ROOT])
    exporter.close()
    assert len(logged.getvalue().splitlines()) == 1


EXIT_WITH_A_SPAN = """
import asyncio, sys, time
from kvferry.metrics import Metrics
from kvferry.runtime import SystemRuntime, now
from kvferry.trace.otlp import OtlpExporter
from kvferry.trace.tracer import Tracer

async def main():
    counter = Metrics().counter("kvferry_span", "Spans.", ("outcome",))
    tracer = Tracer(SystemRuntime(), OtlpExporter(sys.argv[1], {}, "1"), counter)
    tracer.begin("request", now(), ()).end(now())
    sys.stdin.readline()  # until the test says so
    began = time.monotonic()
    await tracer.close()
    print(began, flush=True)

asyncio.run(main())
"""


def test_a_collector_that_never_answers_holds_up_the_end_of_a_process_for_a_second() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(PATIENCE_S)
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with subprocess.Popen(
            [sys.executable, "-c", EXIT_WITH_A_SPAN, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            told, _ = process.communicate("\n", PATIENCE_S)
            ended = time.monotonic()
            connection, _ = silent.accept()  # it did ask
            connection.close()
    assert process.returncode == 0
    assert FLUSH_S * 0.9 < ended - float(told) < FLUSH_S + EXIT_S


def test_without_an_endpoint_there_is_no_exporter() -> None:
    assert open_exporter(PrefillSettings(), SeededRuntime(1)) is None


def test_a_process_tells_what_it_is(receiver: OtlpReceiver) -> None:
    settings = PrefillSettings(name="prefill-3", cluster="lake", otlp_endpoint=receiver.url)
    exporter = open_exporter(settings, SeededRuntime(1))
    assert exporter is not None
    assert exporter.export([ROOT])
    exporter.close()
    resource = receiver.received[0].resource
    assert (resource["service.name"], resource["service.namespace"]) == ("kvferry-prefill", "lake")
    assert resource["service.instance.id"].startswith("prefill-3-")


def test_an_endpoint_without_opentelemetry_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvferry.trace.otlp", None)
    with pytest.raises(SettingError, match=r"--otlp-endpoint.*kvferry\[otel\]"):
        open_exporter(PrefillSettings(otlp_endpoint="http://127.0.0.1:4318"), SeededRuntime(1))


def test_nothing_of_opentelemetry_is_imported_while_it_is_off() -> None:
    program = (
        "import sys, kvferry_gateway.service, kvferry.worker.worker, kvferry.trace.factory\n"
        "assert not any(name.partition('.')[0] == 'opentelemetry' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
