"""The simulated fleet that `kvferry autoscale` sizes: it follows the load, and nobody ends who isn't drained."""

from __future__ import annotations

import pytest
from bench.autoscale_cluster import STARTUP_S, ElasticCluster
from bench.placement_cluster import Cluster
from bench.placement_engine import EngineRates
from bench.traces import TraceRequest

from kvferry.scaling import DecodeRules, DecodeScaling, PrefillRules, PrefillScaling
from kvferry_gateway.placement.targets import Targets

RATES = EngineRates.fit(2000.0, 2000.0, 125.0, 600.0)
TARGETS = Targets(ttft_s=3.0, itl_s=0.05)
PREFILL = PrefillScaling(autoscale=PrefillRules(max_replicas=6, down_after_s=20.0))
DECODE = DecodeScaling(autoscale=DecodeRules(max_replicas=6, down_after_s=20.0))


def tide(low: float, high: float, minute_s: float = 60.0) -> list[TraceRequest]:
    """A minute of little load, one that rises, one of much, three of little: prompts that take half a second."""
    requests, at = [], 0.0
    while at < 6 * minute_s:
        requests.append(TraceRequest(at, 1000, 40))
        flood = min(max(at / minute_s - 1, 0.0), 1.0) if at < 3 * minute_s else 0.0
        at += 1 / (low + flood * (high - low))
    return requests


@pytest.fixture(scope="module")
def ran() -> ElasticCluster:
    cluster = ElasticCluster(PREFILL, DECODE, RATES, TARGETS, seed=1)
    cluster.run(tide(0.5, 5.0))
    return cluster


def test_replicas_follow_the_load_up_and_down(ran: ElasticCluster) -> None:
    def most(start: float, end: float) -> int:
        return max(prefill for at, prefill, _ in ran.replicas if start <= at < end)

    assert ran.replicas[0] == (0.0, 1, 1)
    assert most(60, 200) >= 3  # 2.5 workers' worth of prompts
    assert ran.replicas[-1][1] <= 2
    assert ran.replicas[-1][0] > 180


def test_nobody_ends_with_something_left_to_do_and_all_time_is_paid(ran: ElasticCluster) -> None:
    assert ran.num_ended_early == 0
    from_steps = 0.0
    for (at, prefill, _), (until, _, _) in zip(ran.replicas, [*ran.replicas[1:], (ran.now, 0, 0)], strict=True):
        from_steps += prefill * (until - at)
    # A worker that drains is paid for, too; one that was ordered in the last moments is not there yet.
    assert ran.worker_s["prefill"] == pytest.approx(from_steps, abs=3 * STARTUP_S)
    assert ran.worker_s["prefill"] < 6 * ran.now


def test_it_does_better_than_a_fixed_fleet_of_the_same_price() -> None:
    requests = tide(0.5, 5.0)
    cluster = ElasticCluster(PREFILL, DECODE, RATES, TARGETS, seed=1)
    ours = cluster.run(requests).goodput_at(TARGETS.ttft_s, TARGETS.itl_s)
    size = int(cluster.worker_s["prefill"] / cluster.now)
    fixed = Cluster("ours", size, 1, RATES, TARGETS, seed=1).run(requests)
    assert ours > fixed.goodput_at(TARGETS.ttft_s, TARGETS.itl_s)


def test_the_same_seed_runs_the_same() -> None:
    runs = []
    for _ in range(2):
        cluster = ElasticCluster(PREFILL, DECODE, RATES, TARGETS, seed=2)
        cluster.run(tide(0.5, 4.0, 15.0))
        runs.append((cluster.replicas, cluster.worker_s))
    assert runs[0] == runs[1]
