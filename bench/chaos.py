"""A real stack under steady load, in which something dies every few seconds; then ten times its capacity.

Two prefill workers, two decode workers, two gateways, NATS, UCX (`kvferry up`), the native engine, exact: every text is
compared with that of an undisturbed single worker, token by token. Each fault is aimed: it waits until a live request
is queued, computed, held, fetched or running on its victim. A fault has *hit* those requests that had to be placed
again because of it, or whose gateway it was.

What the run was meant to exercise must have happened, or it fails: a stack that nobody hits survives everything.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from bench.books import violations
from bench.chaos_cases import MAX_MODEL_LEN, undisturbed, workload
from bench.chaos_clients import Clients
from bench.chaos_faults import WHOLE_S, Faults
from bench.chaos_fleet import PHASES, POLL_S, Fleet
from bench.chaos_overload import Overload, overload
from bench.contention import Contention
from bench.options import Options
from bench.prompts import Prompts
from bench.report import Report, percentile
from bench.stack import running
from bench.tap import Heard, tapped
from kvferry.runtime import blocking_clock

NUM_WORKERS: Final = 4
NUM_CLIENTS: Final = 4
MAX_NUM_SEQS: Final = 8  # of one worker
MAX_WAITING: Final = 12  # more than all clients together, so that one worker of a role can take over everything
FLAGS: Final = ("--prefill", "2", "--decode", "2", "--gateways", "2", "--threads", "1")
SETTINGS: Final = {
    "local_prefill_threshold": "0",  # all KV is handed over
    "num_blocks": "320",
    "slot_kb": "512",  # many frames, so that a pull takes a while
    "max_num_seqs": str(MAX_NUM_SEQS),
    "max_waiting": str(MAX_WAITING),
}
SETTLE_S: Final = 10.0  # for the books at the end
NEW_PAIR_S: Final = 2.0
GATEWAY_FREED_S: Final = 5.0
FINISH_SHARE: Final = 0.995
GOODPUT_SHARE: Final = 0.9
RECOVERY_S: Final = 2.0
REFUSAL_S: Final = 1.0  # "at once", for 99 of 100, on a machine that is ten times overloaded
SHARE: Final = "share of admitted requests that finished right"
NEW_PAIR: Final = "longest time from a kill or freeze to a new pair's acceptance"
GATEWAY_FREED: Final = "longest time from a gateway's death to free blocks"
GOODPUT: Final = "goodput under 10 times overload, share of capacity"
REFUSAL: Final = "time to a refusal, p99"
RECOVERY: Final = "recovery after the overload"


@dataclass(frozen=True, slots=True)
class Scale:
    """What a run must at least have done."""

    seconds: float  # of faults
    overload_s: float
    num_cases: int
    failure_budget: int
    requests: int
    kills: int
    hits_per_phase: int

    @classmethod
    def of(cls, options: Options) -> Scale:
        if options.quick:
            # On a machine that is busy besides, living workers are judged gone, which counts as a failure, too.
            return cls(35.0, 4.0, 24, failure_budget=20, requests=15, kills=3, hits_per_phase=0)
        share = min(1.0, options.minutes / 10.0)
        return cls(
            options.minutes * 60,
            20.0,
            round(60 + 140 * share),
            failure_budget=3,
            requests=round(300 * share),
            kills=round(20 * share),
            hits_per_phase=3 if share == 1.0 else int(share > 0.3),
        )


async def measure(options: Options) -> Report:
    scale = Scale.of(options)
    cases = workload(Prompts(options.model_dir, seed=9), scale.num_cases)
    right = await undisturbed(options, cases)
    flags = (*FLAGS, "--max-model-len", str(MAX_MODEL_LEN))
    settings = {**SETTINGS, "failure_budget": str(scale.failure_budget)}
    async with running(options, *flags, settings=settings) as stack, tapped(stack.run_file) as tap:
        fleet = Fleet(stack, tap, NUM_WORKERS)
        rows = await fleet.whole(WHOLE_S)
        report = Report(
            "chaos",
            {
                "stack": "2 prefill, 2 decode, 2 gateways, 1 thread each; " + rows[0]["transport"],
                "level": f"exact, {rows[0]['numerics_id']}",
                "load": f"{NUM_CLIENTS} clients, one request after the other, and bursts of long prompts; "
                f"{scale.num_cases} different requests",
                "faults": f"one after the other for {scale.seconds:g} s, each into a stack that is whole",
            },
        )
        contention = Contention(fleet.pids())
        sampling = asyncio.create_task(contention.run())
        clients = Clients(stack.ports, right)
        faults = Faults(fleet, clients, [case for case in cases if case.is_long], contention)
        stop = asyncio.Event()
        load = asyncio.create_task(clients.steady(cases, NUM_CLIENTS, stop))
        try:
            await faults.run(scale.seconds)
        finally:
            stop.set()
            await asyncio.gather(load, return_exceptions=True)
            await clients.all_done()
        _add_requests(report, clients, scale)
        _add_faults(report, faults, clients, tap.requests, scale)
        report.add("left on the workers afterwards", await _left(report, fleet), "", 0)
        short = [case for case in cases if not case.is_long]
        held = 2 * MAX_NUM_SEQS
        _add_overload(
            report,
            await overload(stack.ports, short, right, contention, num_clients=held, seconds=scale.overload_s),
        )
        report.add("left on the workers after the overload", await _left(report, fleet), "", 0)
        _add_log(report, stack.log.read_text(errors="replace"))
        sampling.cancel()
        await asyncio.gather(sampling, return_exceptions=True)
    return report


def _add_requests(report: Report, clients: Clients, scale: Scale) -> None:
    asked = list(clients.asked.values())
    outcomes = clients.outcomes()
    admitted = [one for one in asked if one.admitted]
    report.add("requests", len(asked), "", scale.requests, at_least=True)
    for outcome, count in sorted(outcomes.items()):
        report.add(f"requests: {outcome}", count)
    share = outcomes["right"] / max(1, len(admitted))
    report.add(SHARE, share, "", FINISH_SHARE, at_least=True)
    report.add("wrong tokens", sum(one.num_wrong for one in asked), "", 0)
    report.add("lost tokens", sum(one.num_lost for one in asked), "", 0)
    report.add("doubled tokens", sum(one.num_doubled for one in asked), "", 0)
    report.add("longest pause of a client", max((one.longest_pause for one in admitted), default=0.0), "s")
    report.raw["not right"] = [
        {"label": one.label, "case": one.case.name, "outcome": one.outcome, "detail": one.detail,
         "tokens": [one.num_wrong, one.num_lost, one.num_doubled]}
        for one in asked
        if one.outcome in ("failed", "wrong")
    ]  # fmt: skip


def _add_faults(report: Report, faults: Faults, clients: Clients, requests: dict[str, Heard], scale: Scale) -> None:
    kinds = Counter(fault.kind for fault in faults.happened)
    for kind, count in sorted(kinds.items()):
        report.add(f"faults: {kind}", count)
    report.raw["phases that were not seen in time"] = [str(aim) for aim in faults.missed]
    hits: Counter[str] = Counter()
    rows: list[dict[str, Any]] = []
    for fault in faults.happened:
        struck = fault.struck(requests)
        hits.update({place.phase for place in struck.values()})
        cut = sum(clients.asked[label].outcome == "cut" for label in fault.clients)
        rows.append(
            {
                "kind": fault.kind,
                "victim": fault.victim,
                "hit": sorted(place.phase for place in struck.values()),
                "cut": cut,
                "new_pair_s": [round(seconds, 3) for seconds in fault.new_pair_s(requests)],
                "freed_s": fault.freed_s,
                "granted_s": round(fault.granted_s, 3),
                "is_kill": fault.is_kill,
            }
        )
    report.raw["faults"] = rows
    kills = sum(row["is_kill"] and bool(row["hit"] or row["cut"]) for row in rows)
    report.add("kills that hit a live request", kills, "", scale.kills, at_least=True)
    for phase in PHASES:
        report.add(f"faults that hit one: {phase}", hits[phase], "", scale.hits_per_phase, at_least=True)
    sudden = [row for row in rows if row["kind"] in ("kill", "freeze")]
    new_pairs = [seconds for row in sudden for seconds in row["new_pair_s"]]
    report.add(NEW_PAIR, max(new_pairs, default=0.0), "s", NEW_PAIR_S)
    report.add("the same, median", percentile(new_pairs, 0.5) if new_pairs else 0.0, "s")
    freed = [fault.freed_s for fault in faults.happened if fault.freed_s is not None]
    report.add(GATEWAY_FREED, max(freed, default=0.0), "s", GATEWAY_FREED_S)


def _add_overload(report: Report, load: Overload) -> None:
    report.add("capacity", load.capacity, "tok/s")
    report.add("offered", load.offered, "req/s")
    report.add(GOODPUT, load.goodput / load.capacity, "", GOODPUT_SHARE, at_least=True)
    report.add("refused with 429", load.num_refused, "", 1, at_least=True)
    report.add("neither right nor refused", load.num_failed, "", 0)
    report.add(REFUSAL, percentile(load.refusal_s or (0.0,), 0.99), "s", REFUSAL_S)
    report.add(RECOVERY, load.recovery_s, "s", RECOVERY_S)
    report.raw["overload"] = {"offered": load.num_offered, "granted_s": load.granted_s}


def _add_log(report: Report, log: str) -> None:
    """What the stack itself said: why attempts were lost, and all about each request that did not end right."""
    report.add("tracebacks in the log", log.count("Traceback (most recent call last)"), "", 0)
    lines = []
    for line in log.splitlines():
        with contextlib.suppress(ValueError):  # not all of it is JSON, and who is killed says half a line
            lines.append(json.loads(line))
    lines = [line for line in lines if isinstance(line, dict)]
    lost = Counter(str(line["reason"]) for line in lines if line.get("event") == "attempt lost")
    report.raw["attempts lost"] = dict(lost)
    for one in report.raw["not right"]:
        one["log"] = [line for line in lines if line.get("request_id") == one["label"]]


async def _left(report: Report, fleet: Fleet) -> int:
    """Blocks, slots, sequences or streams that some worker still has when things had time to settle."""
    rows = await fleet.whole(WHOLE_S)
    deadline = blocking_clock() + SETTLE_S
    while True:
        books = [await fleet.books(row) for row in rows]
        found = [f"{row['name']}: {problem}" for row, book in zip(rows, books, strict=True)
                 for problem in violations(book)]  # fmt: skip
        if not found or blocking_clock() > deadline:
            report.raw.setdefault("left behind", []).extend(found)
            return len(found)
        await asyncio.sleep(POLL_S)
