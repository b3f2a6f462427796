"""Autoscaling against fixed fleets, in simulation on a public trace as it was recorded.

    KVFERRY_TRACES=FOLDER python -m bench.autoscale [--quick]

The fleet of `kvferry autoscale` starts small. It is compared with the smallest fixed fleet that
keeps the targets as often, and with the best of the fixed fleets that cost as many worker-hours. Latencies
and goodput leave out the first quarter of the requests, as every run of the placement simulation does; worker-hours
are of the whole run.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import asdict, dataclass
from typing import Final

from bench import traces
from bench.autoscale_cluster import LOOK_S, STARTUP_S, ElasticCluster
from bench.placement import DEFAULT_RATES
from bench.placement_cluster import Cluster, Outcome
from bench.report import Report
from kvferry.scaling import DecodeRules, DecodeScaling, PrefillRules, PrefillScaling
from kvferry_gateway.placement.targets import Targets
from kvferry_local.autoscale.autoscaler import SCALED

# One core prefills 1,200 tokens, the trace's mean, in 0.7 s and its longest prompts in 4 s.
TARGETS: Final = Targets(ttft_s=5.0, itl_s=0.05)
MAX_REPLICAS: Final = 16
# At first as many as an hour of little load needs.
PREFILL: Final = PrefillScaling(replicas=4, autoscale=PrefillRules(max_replicas=MAX_REPLICAS))
DECODE: Final = DecodeScaling(replicas=2, autoscale=DecodeRules(max_replicas=MAX_REPLICAS))
AS_OFTEN: Final = 0.002  # of goodput, that a fixed fleet may lack and count as equal
KEPT: Final = 0.95  # of the requests, within both targets
CHEAPER: Final = 0.9  # of the worker-hours of the fixed fleet that is as good
QUICK_REQUESTS: Final = 1500


@dataclass(frozen=True, slots=True)
class Row:
    """One fleet's run."""

    fleet: str
    goodput: float  # share of requests that kept both targets
    ttft_p50: float
    ttft_p99: float
    itl_p99: float
    prefill_hours: float
    decode_hours: float

    @property
    def hours(self) -> float:
        return self.prefill_hours + self.decode_hours

    def __str__(self) -> str:
        return (
            f"{self.fleet:28} goodput {self.goodput:6.1%}  TTFT p50 {self.ttft_p50:5.2f} p99 {self.ttft_p99:6.2f} s  "
            f"ITL p99 {self.itl_p99 * 1e3:5.1f} ms  worker-hours {self.hours:5.2f} "
            f"({self.prefill_hours:.2f} prefill, {self.decode_hours:.2f} decode)"
        )


def row(fleet: str, outcome: Outcome, prefill_s: float, decode_s: float) -> Row:
    latencies = outcome.ttft_p50, outcome.ttft_p99, outcome.itl_p99
    return Row(fleet, outcome.goodput, *latencies, prefill_s / 3600, decode_s / 3600)


def elastic(requests: list[traces.TraceRequest]) -> tuple[Row, ElasticCluster]:
    cluster = ElasticCluster(PREFILL, DECODE, DEFAULT_RATES, TARGETS, seed=0)
    outcome = cluster.run(requests)
    return row("autoscaled", outcome, *(cluster.worker_s[role] for role in SCALED)), cluster


def fixed(requests: list[traces.TraceRequest], prefill: int, decode: int) -> Row:
    cluster = Cluster("ours", prefill, decode, DEFAULT_RATES, TARGETS, seed=0)
    outcome = cluster.run(requests)
    return row(f"{prefill} prefill + {decode} decode", outcome, prefill * cluster.now, decode * cluster.now)


def best_of(requests: list[traces.TraceRequest], total: int, decode: float) -> Row:
    """The fixed fleet of `total` workers that keeps the targets most often, with about `decode` decode workers."""
    near = range(max(1, math.floor(decode)), min(total - 1, math.ceil(decode) + 1) + 1)
    row = max((fixed(requests, total - count, count) for count in near), key=lambda row: row.goodput)
    print(f"   {row}", flush=True)
    return row


def as_good(requests: list[traces.TraceRequest], ours: Row, hours: float) -> Row:
    """The fixed fleet with the fewest workers that keeps the targets as often."""
    for total in range(math.ceil(ours.hours / hours), 2 * MAX_REPLICAS + 1):
        row = best_of(requests, total, ours.decode_hours / hours)
        if row.goodput >= ours.goodput - AS_OFTEN:
            return row
    raise ArithmeticError("no fixed fleet is as good")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes of the trace: no figures to quote")
    arguments = parser.parse_args()
    try:
        requests = traces.azure(traces.folder())
    except LookupError as error:
        print(f"   skipped: {error}", file=sys.stderr)
        return 0
    if arguments.quick:
        requests = requests[:QUICK_REQUESTS]
    report = Report("autoscale", {
        "trace": f"Azure 2023, conversations: {len(requests):,} requests in {requests[-1].arrival:,.0f} s",
        "targets": f"TTFT {TARGETS.ttft_s:g} s, mean ITL of a request {TARGETS.itl_s * 1e3:g} ms",
        "rules": f"prefill {PREFILL.autoscale.model_dump()}, decode {DECODE.autoscale.model_dump()}",
        "workers": f"ready {STARTUP_S:g} s after they are ordered; a look every {LOOK_S:g} s",
    })  # fmt: skip
    ours, cluster = elastic(requests)
    print(f"   {ours}", flush=True)
    span = cluster.now / 3600
    rival = as_good(requests, ours, span)
    equal = best_of(requests, max(2, math.floor(ours.hours / span)), ours.decode_hours / span)
    report.raw = {
        "fleets": [asdict(row) for row in (ours, rival, equal)],
        "replicas": cluster.replicas,
    }
    report.add("autoscaled: requests within both targets", ours.goodput, "", KEPT, at_least=True)
    report.add("autoscaled: worker-hours", ours.hours, "h")
    report.add(f"fixed fleet as good ({rival.fleet}): worker-hours", rival.hours, "h")
    report.add("worker-hours, autoscaled ÷ that fleet", ours.hours / rival.hours, "", CHEAPER)
    report.add(f"fixed fleet as dear ({equal.fleet}): requests within both targets", equal.goodput)
    report.add("workers that ended before they were drained", cluster.num_ended_early, "", 0)
    print(report.render(), flush=True)
    if not arguments.quick:
        report.write()
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
