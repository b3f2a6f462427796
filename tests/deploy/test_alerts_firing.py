"""Every alert fires in a real Prometheus, which scrapes the metrics of a gateway and two workers over HTTP.

`test_alerts.py` holds each rule, alone and at its true times, against written series. Here times are 1/60, and the
product's own counters move: that names, labels and exposition fit together is what is shown.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final
from wsgiref.simple_server import WSGIServer

import pytest
from prometheus_client import start_http_server
from prometheus_server import ALERTS, Prometheus, alert_rules
from stack import eventually

from kvferry.metrics import Metrics
from kvferry.worker.metrics import WorkerMetrics
from kvferry_gateway.metrics import GatewayMetrics

MODEL: Final = "smollm2"
ROUTE: Final = "chat"
INTERVAL: Final = "500ms"  # of scrapes and evaluations
TURN_S: Final = 0.1  # between two movements of the counters
QUICKER: Final = 60
SHORTEST_WINDOW_S: Final = 5  # some scrapes, also on a machine that is late with them
SECONDS: Final = {"s": 1, "m": 60}
WELL_S: Final = 8.0
PATIENCE_S: Final = 120.0


def quick(rules: str) -> str:
    """The rules with all their times shorter."""

    def shorter(found: re.Match[str]) -> str:
        kind, seconds = found[1], int(found[2]) * SECONDS[found[3]] // QUICKER
        return f"{kind}{seconds if kind == 'for: ' else max(seconds, SHORTEST_WINDOW_S)}s"

    return re.sub(r"(\[|offset |for: )(\d+)([sm])\b", shorter, rules)


class Cluster:
    """What a gateway, a prefill and a decode worker tell, and the faults that they tell of: all, every turn."""

    def __init__(self) -> None:
        self.gateway = GatewayMetrics([MODEL])
        self.workers = {"prefill": WorkerMetrics(), "decode": WorkerMetrics()}
        self.faulty = threading.Event()
        self._stop = threading.Event()
        self._servers: dict[str, tuple[WSGIServer, threading.Thread]] = {}

    def serve(self, stack: ExitStack) -> dict[str, list[str]]:
        """Addresses by job."""
        told: dict[str, Metrics] = {"gateway": self.gateway, **self.workers}
        for job, metrics in told.items():
            self._servers[job] = start_http_server(0, "127.0.0.1", registry=metrics.registry)
            stack.callback(self._end, job)
        turns = threading.Thread(target=self._run)
        turns.start()
        stack.callback(turns.join)
        stack.callback(self._stop.set)
        return {job: [f"127.0.0.1:{server.server_port}"] for job, (server, _) in self._servers.items()}

    def _end(self, job: str) -> None:
        if job in self._servers:
            server, thread = self._servers.pop(job)
            server.shutdown()
            server.server_close()
            thread.join()

    def _run(self) -> None:
        while not self._stop.wait(TURN_S):
            self._work()
            if self.faulty.is_set():
                for fault in self.faults.values():
                    fault()

    def _work(self) -> None:
        """A turn of a cluster in which all is well."""
        self.gateway.requests.labels(MODEL, ROUTE, "ok").inc(10)
        self.gateway.placements.labels(MODEL, "pair").inc(10)
        self.gateway.ttft.labels(MODEL).observe(0.2)
        self.gateway.itl.observe(MODEL, 0.01, 10)
        self._hold_blocks(10)

    def _hold_blocks(self, count: int) -> None:
        for state, blocks in (("free", 2), ("cached", 98 - count), ("running", count)):
            self.workers["decode"].blocks.labels(state).set(blocks)

    @property
    def faults(self) -> dict[str, Callable[[], object]]:
        """By the alert that each makes fire."""
        gateway, decode = self.gateway, self.workers["decode"]
        return {
            "KvferryNoUsableWorker": gateway.requests.labels(MODEL, ROUTE, "no_worker").inc,
            "KvferryTokenMismatch": gateway.mismatches.inc,
            "KvferryWorkerWedged": gateway.replacements.labels(MODEL, "wedged").inc,
            "KvferryNoPrefillWorker": lambda: self._end("prefill"),
            "KvferryTargetDown": lambda: self._end("prefill"),
            "KvferryWorkerGone": gateway.workers_gone.inc,
            "KvferryWorkersFlapping": gateway.workers_gone.inc,
            "KvferryBusDown": gateway.bus_drops.inc,
            "KvferryTtftAboveTarget": lambda: gateway.ttft.labels(MODEL).observe(3),
            "KvferryItlAboveTarget": lambda: gateway.itl.observe(MODEL, 0.2, 10),
            "KvferryRequestsRefused": lambda: gateway.requests.labels(MODEL, ROUTE, "rate_limit_exceeded").inc(5),
            "KvferryKvPoolNearlyFull": lambda: self._hold_blocks(97),
            "KvferryTransferFailures": decode.transfer_failures.labels("connection_lost").inc,
            "KvferryLeaseExpiries": decode.lease_expiries.inc,
            "KvferryReplacements": lambda: gateway.replacements.labels(MODEL, "decode_gone").inc(5),
        }


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def prometheus(cluster: Cluster, tmp_path: Path) -> Iterator[Prometheus]:
    rules = tmp_path / "quick.yml"
    rules.write_text(quick(ALERTS.read_text()))
    with ExitStack() as stack:
        server = Prometheus(tmp_path, cluster.serve(stack), rules=rules, interval=INTERVAL)
        stack.callback(server.close)
        yield server


def test_each_alert_has_its_fault(cluster: Cluster) -> None:
    assert cluster.faults.keys() == alert_rules().keys()


def test_no_alert_fires_while_all_is_well_and_each_does_by_its_fault(cluster: Cluster, prometheus: Prometheus) -> None:
    eventually(lambda: len(prometheus.query("kvferry_kv_blocks and on (job) up == 1")) == 3, PATIENCE_S)
    eventually(lambda: not prometheus.firing(), PATIENCE_S)  # before the first scrape no worker is up
    began = time.monotonic()
    while time.monotonic() - began < WELL_S:
        assert prometheus.firing() == set()
    cluster.faulty.set()
    fired: set[str] = set()

    def all_fired() -> bool:
        fired.update(prometheus.firing())
        return fired == cluster.faults.keys()

    with suppress(AssertionError):  # the next one tells more
        eventually(all_fired, PATIENCE_S)
    assert fired == cluster.faults.keys()


def test_times_are_shorter_and_nothing_else_is() -> None:
    assert quick("for: 5m") == "for: 5s"
    assert quick("for: 15s") == "for: 0s"
    assert quick("rate(x[30m]) > 4 unless x offset 2m") == "rate(x[30s]) > 4 unless x offset 5s"
    assert quick(ALERTS.read_text()).count("\n") == ALERTS.read_text().count("\n")
