"""Logs, metrics and readiness reports of a process."""

from __future__ import annotations

import io
import json
import logging
import os

import pytest
import structlog
from pydantic import SecretStr

from kvferry.log import get_logger, setup_logging
from kvferry.metrics import Metrics
from kvferry.ready import MAX_REPORT_BYTES, READY_FD, report


@pytest.fixture
def logged() -> io.StringIO:
    """What a process that logs at info writes."""
    stream = io.StringIO()
    setup_logging("info", "auto", service="decode-0", stream=stream)
    return stream


def test_lines_are_json_off_a_terminal_and_carry_service_and_context(logged: io.StringIO) -> None:
    log = get_logger("kvferry.test")
    with structlog.contextvars.bound_contextvars(request_id="r1", attempt=2):
        log.info("accepted", blocks=3)
    log.debug("not shown")
    (line,) = logged.getvalue().splitlines()
    entry = json.loads(line)
    assert entry.pop("timestamp").endswith("Z")
    assert entry == {
        "event": "accepted", "level": "info", "service": "decode-0", "component": "kvferry.test",
        "request_id": "r1", "attempt": 2, "blocks": 3,
    }  # fmt: skip


def test_lines_of_libraries_have_the_same_form(logged: io.StringIO) -> None:
    logging.getLogger("library").warning("retry %d", 2)
    entry = json.loads(logged.getvalue())
    assert (entry["event"], entry["level"], entry["service"]) == ("retry 2", "warning", "decode-0")


def test_a_secret_is_not_written(logged: io.StringIO) -> None:
    get_logger("x").info("settings", key=SecretStr("hush"))
    assert "hush" not in logged.getvalue()
    assert "key" in logged.getvalue()


@pytest.mark.parametrize("log_format", ["console", "json"])
def test_a_traceback_shows_no_local_variable(log_format: str, logged: io.StringIO) -> None:
    stream = io.StringIO()
    setup_logging("debug", log_format, service="x", stream=stream)

    def fail(password: str) -> None:
        raise ValueError(f"{len(password)} characters")

    for logger in (get_logger("x"), logging.getLogger("library")):
        try:
            fail("".join(("hu", "sh")))  # so that no line of source shows it either
        except ValueError:
            logger.exception("failed")
    text = stream.getvalue()
    assert text.count("4 characters") == 2, "the traceback is there"
    assert text.count("in fail") == 2
    assert "hush" not in text


@pytest.mark.parametrize("name", ["kvferry_kv_bytes", "kvferry_time_to_first_token_seconds"])
def test_a_metric_is_named_by_noun_and_unit(name: str) -> None:
    metrics = Metrics()
    metrics.counter(name, "A counter.").inc(2)
    assert metrics.value(f"{name}_total") == 2
    assert f"{name}_total 2.0" in metrics.render().decode()


@pytest.mark.parametrize("name", ["kv_bytes", "kvferry_", "kvferry_KV_bytes", "kvferry_step_ms", "kvferry_x_total"])
def test_a_metric_with_another_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="kvferry_<noun>_<unit>"):
        Metrics().gauge(name, "A gauge.")


def test_two_processes_in_one_do_not_share_metrics() -> None:
    one, other = Metrics(), Metrics()
    one.gauge("kvferry_free_blocks", "Free.").set(1)
    other.gauge("kvferry_free_blocks", "Free.").set(2)
    assert (one.value("kvferry_free_blocks"), other.value("kvferry_free_blocks")) == (1, 2)


async def test_metrics_are_served_as_an_asgi_application() -> None:
    sent: list[dict[str, object]] = []

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    metrics = Metrics()
    metrics.counter("kvferry_requests", "Requests.", ["outcome"]).labels("ok").inc()
    await metrics.asgi({"type": "http", "method": "GET"}, receive, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 200
    assert b'kvferry_requests_total{outcome="ok"} 1.0' in sent[1]["body"]  # type: ignore[operator]


def test_reports_are_json_lines_on_the_inherited_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as reports:
        monkeypatch.setenv(READY_FD, str(write_end))
        report("load", fraction=0.5)
        report("load", blob="x" * MAX_REPORT_BYTES)  # too long to be atomic: dropped
        report("ready", incarnation=7)
        os.close(write_end)
        assert [json.loads(line) for line in reports] == [
            {"event": "progress", "stage": "load", "fraction": 0.5},
            {"event": "ready", "incarnation": 7},
        ]


@pytest.mark.parametrize("descriptor", ["", "x", "-1", "987654"])
def test_a_report_that_nobody_reads_harms_nothing(monkeypatch: pytest.MonkeyPatch, descriptor: str) -> None:
    monkeypatch.setenv(READY_FD, descriptor)
    report("ready", incarnation=1)
