"""A real Prometheus beside a real stack: every expression of the dashboard and of the alerts is asked for."""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Iterator
from typing import Any, Final

import pytest
from prometheus_server import Prometheus, alert_rules, panel_expressions
from stack import Stack, eventually

PATIENCE_S: Final = 90.0
PROMPT_TOKENS: Final = 320  # above local_prefill_threshold, so that KV moves
SOMETHING_HAPPENED: Final = (
    "sum(increase(kvferry_ttft_seconds_count[1m])) > 0 and sum(increase(kvferry_handoff_tail_seconds_count[1m])) > 0"
)
BOUND: Final = re.compile(r" (>|==) [0-9.]+(?= or |$)", re.MULTILINE)
SILENT_WHILE_WELL: Final = {"KvferryNoPrefillWorker"}  # asks for what is missing


def answered(stack: Stack, turn: int) -> None:
    """A request whose prompt no cache holds."""
    prompt = [20_000 + turn * PROMPT_TOKENS + i for i in range(PROMPT_TOKENS)]
    with stack.http() as http:
        body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "ignore_eos": True}
        http.post("/v1/completions", json=body, timeout=PATIENCE_S).raise_for_status()


@pytest.fixture(scope="module")
def prometheus(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It has seen every counter of the stack before and after a request whose KV moved."""
    targets: dict[str, list[str]] = {"gateway": [stack.url.removeprefix("http://")], "prefill": [], "decode": []}
    for worker in stack.workers():
        targets[worker["role"]].append(f"127.0.0.1:{worker['debug_port']}")
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), targets)
    turns = itertools.count()

    def asked() -> None:
        """Returns once what a request has changed is scraped."""
        answered(stack, next(turns))
        moment = time.time()
        eventually(lambda: scraped_since(server, moment), PATIENCE_S)

    def shows() -> list[dict[str, Any]]:
        asked()
        return server.query(SOMETHING_HAPPENED)

    try:
        asked()  # counters with labels appear
        eventually(shows, PATIENCE_S)
        yield server
    finally:
        server.close()


def scraped_since(server: Prometheus, moment: float) -> bool:
    """Whether all three targets have answered a scrape that began after `moment`."""
    return len(server.query(f"timestamp(up) > {moment:.3f} and up == 1")) == 3


def is_number(sample: dict[str, Any]) -> bool:
    return not math.isnan(float(sample["value"][1]))


@pytest.mark.parametrize("expression", panel_expressions())
def test_every_panel_shows_something_of_a_stack_that_works(prometheus: Prometheus, expression: str) -> None:
    shown = prometheus.query(expression)
    assert any(map(is_number, shown)), shown


def test_prometheus_has_loaded_every_alert_and_can_evaluate_it(prometheus: Prometheus) -> None:
    rules = eventually(lambda: all(r["health"] == "ok" for r in prometheus.rules()) and prometheus.rules(), PATIENCE_S)
    assert {rule["name"] for rule in rules} == alert_rules().keys()


@pytest.mark.parametrize("alert", sorted(alert_rules().keys() - SILENT_WHILE_WELL))
def test_what_an_alert_compares_has_a_value(prometheus: Prometheus, alert: str) -> None:
    compared, bounds = BOUND.subn("", alert_rules()[alert]["expr"])
    assert bounds
    shown = prometheus.query(compared)
    assert any(map(is_number, shown)), (compared, shown)


def test_alerts_read_series_that_the_stack_has(prometheus: Prometheus) -> None:
    """A selector that matches nothing would keep an alert silent for ever."""
    for selector in (
        'up{job="decode"} == 1',
        'kvferry_kv_blocks{state=~"free|cached"}',
        'kvferry_kv_blocks{state!~"free|cached"}',
        'kvferry_request_total{outcome="ok"}',
        "kvferry_ttft_seconds_bucket",
        "kvferry_itl_seconds_bucket",
        "kvferry_token_mismatch_total",
        "kvferry_worker_gone_total",
        "kvferry_lease_expiry_total",
        "kvferry_bus_drop_total",
        "kvferry_placement_total",
    ):
        assert prometheus.query(selector), selector


def test_nothing_is_critical_about_a_stack_that_works(prometheus: Prometheus) -> None:
    firing = prometheus.query('ALERTS{alertstate="firing",severity="critical"}')
    assert firing == []


def test_an_expression_that_cannot_be_read_would_be_found(prometheus: Prometheus) -> None:
    with pytest.raises(AssertionError, match="parse error"):
        prometheus.query("sum(rate(kvferry_request_total))) > 1")
