"""The kinds of transfer failures that are shown from the start are those that the code counts."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

from kvferry.worker.handoff.incoming import Incoming
from kvferry.worker.metrics import TRANSFER_FAILURES, WorkerMetrics

SOURCES = Path(__file__).parents[3]
COUNTED = re.compile(r'(?:transfer_failures\.labels|CorruptFrame|Wrong)\(\s*"(\w+)"')


def counted() -> Iterator[str]:
    """Every kind that the sources name."""
    for part in ("shared", "services"):
        for file in (SOURCES / part).rglob("*.py"):
            yield from COUNTED.findall(file.read_text())
    yield from re.findall(r'return "(\w+)"', inspect.getsource(Incoming.fault))


def test_every_kind_that_is_counted_is_shown_from_zero_on() -> None:
    assert set(counted()) == set(TRANSFER_FAILURES)


def test_a_worker_that_has_just_begun_shows_them() -> None:
    text = WorkerMetrics().render().decode()
    for kind in TRANSFER_FAILURES:
        assert f'kvferry_transfer_failure_total{{kind="{kind}"}} 0.0' in text
