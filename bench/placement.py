"""Placement against round-robin, least-loaded and cached-prefix routing, in simulation on public traces.

    KVFERRY_TRACES=FOLDER python -m bench.placement [--quick] [--rates JSON]

Arrivals are scaled so that under least-loaded the prefill workers are busy for the stated share of the time.
A run counts three quarters of its requests; the first quarter fills caches. Every policy hears the same
heartbeats and events, 250 ms old at most. Intervals are 95 % Student intervals over seeds, of differences and
ratios within one seed. Without traces only the figures of scale are measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from bench import placement_scale, traces
from bench.placement_cluster import NUM_GATEWAYS, Cluster, Outcome
from bench.placement_engine import EngineRates
from bench.placement_policies import POLICIES
from bench.report import Report
from kvferry_gateway.placement.targets import Targets

# tok/s on one core: prompts of 512 and 2,048 tokens, 1 and 8 streams.
DEFAULT_RATES: Final = EngineRates.fit(1973.0, 1500.0, 136.0, 662.0)
RIVALS: Final = tuple(name for name in POLICIES if name != "ours")
BALANCED_BATCH: Final = 4  # streams on a decode worker that a cluster is made for
OTHER_TTFT_S: Final = (0.5, 1.0, 2.0, 4.0)  # goodput is told for these targets, too
# Two-sided 95 % quantiles of Student's t for 1, 2, … degrees of freedom.
STUDENT: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True, slots=True)
class Case:
    trace: str
    workers: int
    requests: int
    seeds: int
    loads: tuple[float, ...]


FULL: Final = (
    Case("mooncake", 16, 2500, 5, (0.5, 0.7, 0.85)),
    Case("azure", 16, 1500, 6, (0.5, 0.7, 0.85)),
    Case("mooncake", 64, 5000, 3, (0.7, 0.85)),
    Case("mooncake", 4, 1200, 4, (0.5, 0.7, 0.85)),
)
QUICK: Final = (Case("mooncake", 16, 1200, 2, (0.7, 0.85)), Case("azure", 16, 800, 2, (0.7,)))


@dataclass(frozen=True, slots=True)
class Interval:
    mean: float
    half: float  # of its width

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        if len(values) < 2:
            return cls(values[0], math.inf)
        freedom = len(values) - 1
        spread = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), STUDENT[min(freedom, len(STUDENT)) - 1] * spread)

    def __str__(self) -> str:
        return f"{self.mean:.3g} ± {self.half:.2g}"


def split(requests: list[traces.TraceRequest], workers: int, rates: EngineRates) -> tuple[int, int]:
    """(prefill, decode) workers that a trace keeps about equally busy."""
    prefill = statistics.fmean(rates.prefill_s(request.prompt_tokens, 0) for request in requests)
    context = statistics.fmean(request.prompt_tokens for request in requests) * BALANCED_BATCH
    step = rates.step_s(BALANCED_BATCH, context) / BALANCED_BATCH
    decode = statistics.fmean(request.output_tokens for request in requests) * step
    num_decode = min(workers - 1, max(1, round(workers * decode / (prefill + decode))))
    return workers - num_decode, num_decode


def run_case(case: Case, rates: EngineRates, targets: Targets, folder: Path) -> dict[float, dict[str, list[Outcome]]]:
    """Outcomes by load and policy, seed by seed."""
    trace = traces.mooncake(folder) if case.trace == "mooncake" else traces.azure(folder)
    shape = split(trace, case.workers, rates)
    outcomes: dict[float, dict[str, list[Outcome]]] = {load: {name: [] for name in POLICIES} for load in case.loads}
    for seed in range(case.seeds):
        chosen = traces.excerpt(trace, case.requests, seed)

        def outcome(
            policy: str, rate: float, seed: int = seed, chosen: Sequence[traces.TraceRequest] = chosen
        ) -> Outcome:
            return Cluster(policy, *shape, rates, targets, seed).run(traces.scaled(list(chosen), rate))

        prefill = statistics.fmean(rates.prefill_s(request.prompt_tokens, 0) for request in chosen)
        capacity = shape[0] / outcome("least_loaded", 0.7 * shape[0] / prefill).prefill_s
        for load in case.loads:
            for policy in POLICIES:
                outcomes[load][policy].append(outcome(policy, capacity * load))
    print(f"   {case.trace}: {shape[0]} prefill and {shape[1]} decode workers", flush=True)
    return outcomes


def describe(report: Report, case: Case, load: float, outcomes: dict[str, list[Outcome]]) -> None:
    """Means over seeds of each policy, into the raw part and onto the screen."""
    rows = {}
    for policy, runs in outcomes.items():
        fields = ("ttft_p50", "ttft_p99", "itl_p99", "goodput", "hit_rate", "utilisation", "local_share")
        row: dict[str, Any] = {name: statistics.fmean(getattr(run, name) for run in runs) for name in fields}
        for ttft in OTHER_TTFT_S:
            row[f"goodput_ttft_{ttft:g}s"] = statistics.fmean(run.goodput_at(ttft, report_itl(report)) for run in runs)
        row["goodput_by_seed"] = [run.goodput for run in runs]
        row["ttft_p50_by_seed"] = [run.ttft_p50 for run in runs]
        rows[policy] = row
        print(
            f"   {case.trace:8} {case.workers:3} at {load:4.0%} {policy:13} TTFT {row['ttft_p50'] * 1e3:6.0f} / "
            f"{row['ttft_p99'] * 1e3:6.0f} ms  ITL p99 {row['itl_p99'] * 1e3:5.1f} ms  goodput {row['goodput']:6.1%}  "
            f"hits {row['hit_rate']:5.1%}  busy {row['utilisation']:4.0%}  on decode {row['local_share']:5.1%}",
            flush=True,
        )
    report.raw[f"{case.trace}, {case.workers} workers at {load:.0%}"] = rows


def report_itl(report: Report) -> float:
    return float(report.raw["targets"]["itl_s"])


def judge(report: Report, case: Case, load: float, outcomes: dict[str, list[Outcome]]) -> None:
    """The figures that placement promises."""
    ours, where = outcomes["ours"], f"{case.trace}, {case.workers} workers at {load:.0%}"
    if case.trace == "mooncake" and case.workers >= 16 and load == 0.7:
        ratios = [b.ttft_p50 / a.ttft_p50 for a, b in zip(ours, outcomes["round_robin"], strict=True)]
        interval = Interval.of(ratios)
        report.add(f"{where}: TTFT p50, round-robin ÷ ours ({interval})", interval.mean, "×", 1.6, at_least=True)
    if case.trace == "mooncake" and case.workers >= 16 and load == 0.85:
        for rival in RIVALS:
            points = [100 * (a.goodput - b.goodput) for a, b in zip(ours, outcomes[rival], strict=True)]
            interval = Interval.of(points)
            report.add(f"{where}: goodput, ours − {rival} ({interval})", interval.mean, "points", 5.0, at_least=True)
    if case.trace == "azure":
        means = {name: statistics.fmean(run.goodput for run in runs) for name, runs in outcomes.items()}
        best = max(RIVALS, key=lambda name: means[name])
        shares = [a.goodput / b.goodput for a, b in zip(ours, outcomes[best], strict=True)]
        interval = Interval.of(shares)
        report.add(
            f"{where}: goodput, ours ÷ {best} ({interval})", means["ours"] / means[best], "", 0.97, at_least=True
        )
        medians = {name: statistics.fmean(run.ttft_p50 for run in runs) for name, runs in outcomes.items()}
        best = min(RIVALS, key=lambda name: medians[name])
        report.add(f"{where}: TTFT p50, ours ÷ {best}", medians["ours"] / medians[best], "", 1.03)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests and seeds: no figures to quote")
    parser.add_argument("--rates", type=Path, help="JSON with tok/s as bench/engine.py measures them: prefill_512, …")
    parser.add_argument("--ttft", type=float, default=Targets().ttft_s, help="target in seconds")
    parser.add_argument("--itl", type=float, default=Targets().itl_s, help="target in seconds")
    arguments = parser.parse_args()
    rates = EngineRates.read(arguments.rates) if arguments.rates else DEFAULT_RATES
    targets = Targets(arguments.ttft, arguments.itl)
    cases = QUICK if arguments.quick else FULL
    steps_ms = [1e3 * rates.step_s(streams, 256 * streams) for streams in (1, 8)]
    report = Report("placement", {
        "engine": f"{1 / rates.prefill_token_s:,.0f} prefill tok/s at first, a step {steps_ms[0]:.1f} ms for one "
        f"stream and {steps_ms[1]:.1f} ms for eight; link {rates.link_bytes_per_s / 1e9:g} GB/s",
        "cache": f"{rates.num_blocks:,} blocks of {traces.BLOCK_SIZE} tokens on each worker",
        "targets": f"TTFT {targets.ttft_s:g} s, mean ITL of a request {targets.itl_s * 1e3:g} ms",
        "gateways": f"{NUM_GATEWAYS}; loads and events 250 ms old at most",
    })  # fmt: skip
    report.raw["targets"], report.raw["rates"] = {"ttft_s": targets.ttft_s, "itl_s": targets.itl_s}, asdict(rates)
    placement_scale.measure(report, arguments.quick)
    try:
        folder = traces.folder()
    except LookupError as error:
        print(f"   only figures of scale: {error}", file=sys.stderr)
    else:
        for case in cases:
            for load, outcomes in run_case(case, rates, targets, folder).items():
                describe(report, case, load, outcomes)
                known = len(report.figures)
                judge(report, case, load, outcomes)
                for figure in report.figures[known:]:
                    print(f"   {figure.name}: {figure.value:.3f}", flush=True)
    print(report.render(), flush=True)
    if not arguments.quick:
        report.write()
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
