"""Exactness end to end: what a pair of workers says is, to the letter, what one worker says alone.

`bench.parity` is the whole of it (`python -m bench parity parity_kill`); here its small form runs. Prompts of 1 to
4,000 tokens, 8 at once, half greedy and half seeded, some with shared prefixes; then a storm of long answers that
outgrow the pools. The report's own limits demand that pulls, prefix hits and preemptions happened.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from bench import parity
from bench.options import Options
from bench.report import Report
from runners import native_library


def held(report: Report) -> dict[str, float]:
    """The figures of a report whose limits all hold, by name."""
    assert report.holds, report.render()
    return {figure.name: figure.value for figure in report.figures}


@pytest.mark.timeout(900)
async def test_a_pair_of_workers_says_what_one_worker_says_whatever_is_killed(model_dir: Path) -> None:
    """One of two decode workers is killed in the middle of its streams."""
    native_library()  # or skip: the torch engine is not exact
    report = await parity.measure_with_a_kill(Options(model_dir, quick=True))
    figures = held(report)
    assert report.conditions["level"].startswith("exact, native")
    assert figures["texts that differ from the single worker's"] == 0
    assert figures["requests"] >= 40
    assert figures["attempts beyond the first"] > 0
    happened = ("pulls", "preemptions", "prefix-cache hits on prefill", "streams on the decode worker that was killed")
    assert all(figures[name] > 0 for name in happened)
