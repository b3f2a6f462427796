"""`bench autoscale` on the first ten minutes of the recorded trace: targets kept, for less than a fixed fleet takes.

The fixed fleet is the one that the whole hour needs, as the results in `bench/results` name it: who sizes by hand buys
for the peak.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
from bench import traces
from bench.autoscale import CHEAPER, KEPT, TARGETS, elastic, fixed

RESULTS: Final = Path(__file__).parents[3] / "bench" / "results" / "autoscale.json"
NUM_REQUESTS: Final = 3000


def test_the_autoscaled_fleet_keeps_the_targets_for_fewer_worker_hours_than_the_fixed_one() -> None:
    try:
        requests = traces.azure(traces.folder())[:NUM_REQUESTS]
    except (LookupError, FileNotFoundError) as error:
        pytest.skip(f"no recorded trace: {error}")
    assert (TARGETS.ttft_s, TARGETS.itl_s) == (5.0, 0.05), "as the documents have them"
    as_good = json.loads(RESULTS.read_text())["raw"]["fleets"][1]["fleet"]
    prefill, decode = (int(part.split()[0]) for part in as_good.split("+"))
    theirs = fixed(requests, prefill, decode)
    ours, cluster = elastic(requests)
    assert min(ours.goodput, theirs.goodput) >= KEPT, (ours, theirs)
    assert ours.hours <= CHEAPER * theirs.hours, (ours, theirs)
    assert cluster.num_ended_early == 0
    assert len({(prefill, decode) for _, prefill, decode in cluster.replicas}) > 2, "it followed the load"
