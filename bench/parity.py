"""Is what a disaggregated stack says right, to the byte and to the token? In three steps:

1. The pools: every token slot that D fetched holds the bytes that it had at P, by a digest over both pools.
2. The single worker: where the workers run `exact`, every one of its texts is equal; in `fast` near-ties may part
   them, and how many are equal is only told.
3. In `fast`, the reference pass: a teacher-forced pass over each finished text accepts every token.

The workload has shared prefixes, mixed lengths, greedy and seeded draws, and pools too small for all of it at once;
then a storm of answers that outgrow D's pool together, so that dozens are preempted. `measure_with_a_kill` kills a
decode worker under them besides. What it was meant to exercise must have happened, or the run fails: a check of
nothing is no check.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from bench.options import Options
from bench.prompts import Prompts
from bench.reference import flipped_bit_is_seen, largest_gap, swapped_token_is_refused
from bench.report import Report
from bench.stack import Stack, metric, running
from bench.tap import Heard, Tap, tapped
from kvferry.engine.reference import EPSILON
from kvferry.runtime import blocking_clock
from kvferry_local.bench.stream import Stream

REQUESTS: Final = 64
QUICK_REQUESTS: Final = 16
CONCURRENCY: Final = 8
STORM_REQUESTS: Final = 64
QUICK_STORM_REQUESTS: Final = 24
STORM_CONCURRENCY: Final = 32
MIN_PREEMPTIONS: Final = 24
MIN_QUICK_PREEMPTIONS: Final = 8
KILL_AFTER_TOKENS: Final = 100  # of a stream of the storm
MAX_PROMPT: Final = 4000
NUM_BLOCKS: Final = 290  # 4,640 tokens: one long prompt and a few short ones
MAX_MODEL_LEN: Final = 4608
SETTINGS: Final = {
    "local_prefill_threshold": "0",
    "debug_digests": "true",
    "num_blocks": str(NUM_BLOCKS),
}
# A grammar that no answer reaches the end of.
ENDLESS: Final = {
    "type": "array", "minItems": 1000,
    "items": {
        "type": "object", "properties": {"name": {"type": "string"}, "on": {"type": "boolean"}},
        "required": ["name", "on"], "additionalProperties": False,
    },
}  # fmt: skip
DIGESTS_TIMEOUT_S: Final = 10.0
DIGESTS_POLL_S: Final = 0.2
KILL_POLL_S: Final = 0.02

Digests: TypeAlias = Mapping[str, Mapping[str, str]]  # ticket (hex) -> token position -> digest of that slot


@dataclass(frozen=True, slots=True)
class Case:
    request_id: str
    body: dict[str, Any]


async def measure(options: Options) -> Report:
    return await _measure(options, kill=False)


async def measure_with_a_kill(options: Options) -> Report:
    """With two decode workers, one of which is killed in mid-stream."""
    return await _measure(options, kill=True)


async def _measure(options: Options, *, kill: bool) -> Report:
    prompts = Prompts(options.model_dir, seed=4)
    calm = workload(prompts, QUICK_REQUESTS if options.quick else REQUESTS)
    rough = storm(prompts, QUICK_STORM_REQUESTS if options.quick else STORM_REQUESTS)
    cases = calm + rough
    length = ("--max-model-len", str(MAX_MODEL_LEN))
    pairs = ("--prefill", "1", "--decode", "2" if kill else "1")
    async with running(options, *length, *pairs, settings=SETTINGS) as stack, tapped(stack.run_file) as tap:
        numerics = await _numerics(stack)
        apart = await _run(stack, calm, CONCURRENCY)
        killing = asyncio.create_task(_kill_in_mid_stream(stack, tap, rough)) if kill else None
        apart |= await _run(stack, rough, STORM_CONCURRENCY)
        report = Report(
            "parity_kill" if kill else "parity",
            {
                "level": "fast" if numerics is None else f"exact, {numerics}",
                "workload": f"prompts of 1 to {MAX_PROMPT} tokens, {CONCURRENCY} at once, half greedy, half seeded; "
                f"then {len(rough)} long answers to short ones, {STORM_CONCURRENCY} at once",
                "pools": f"{NUM_BLOCKS} blocks on each worker, local prefill off",
            },
        )
        if killing is not None:
            if not killing.done():
                killing.cancel()
                raise RuntimeError("no stream could be caught in its middle")
            report.add("streams on the decode worker that was killed", await killing, "", 1, at_least=True)
        await _add_transfers(report, stack, cases, quick=options.quick, kill=kill)
    single_settings = {**SETTINGS, "debug_digests": "false"}
    async with running(options, *length, "--prefill", "0", "--decode", "1", settings=single_settings) as stack:
        if await _numerics(stack) != numerics:
            raise RuntimeError("the single worker runs other numerics than the pair")
        single = await _run(stack, calm, CONCURRENCY) | await _run(stack, rough, STORM_CONCURRENCY)
    heard = [_complete(tap, case, apart[case.request_id]) for case in cases]
    report.add("requests", len(cases), "", len(calm) + len(rough), at_least=True)
    report.add("tokens judged", sum(len(one.generated) for one in heard))
    report.add("attempts beyond the first", sum(len(one.attempts) - 1 for one in heard), "", 1, at_least=True)
    report.add("control: one flipped bit is seen", flipped_bit_is_seen(options.model_dir, heard[0]), "", 1, True)
    differing = [case.request_id for case in cases if apart[case.request_id].text != single[case.request_id].text]
    report.raw["texts that differ"] = differing
    if numerics is not None:
        report.add("texts that differ from the single worker's", len(differing), "", 0)
        return report
    report.add("texts equal to the single worker's", len(cases) - len(differing))
    gap = await asyncio.get_running_loop().run_in_executor(None, largest_gap, options.model_dir, MAX_MODEL_LEN, heard)
    report.add("largest gap of the reference pass", gap, "logit", EPSILON)
    report.add(
        "control: a token beyond ε is refused", swapped_token_is_refused(options.model_dir, heard[0]), "", 1, True
    )
    return report


async def _numerics(stack: Stack) -> str | None:
    """The numerics_id that all workers run exactly; None: they run `fast`, or not all the same."""
    rows = await stack.workers()
    ids = {row["numerics_id"] for row in rows}
    return str(ids.pop()) if len(ids) == 1 and all(row["exact"] for row in rows) else None


def storm(prompts: Prompts, count: int) -> list[Case]:
    """Short prompts with long answers: each is admitted with a few blocks, and together they outgrow the pool. Every
    fourth one follows a grammar, whose state must come through preemptions and kills."""
    cases = []
    for index in range(count):
        body: dict[str, Any] = {
            "prompt": prompts.tokens(16 + index),
            "max_tokens": 256 + 4 * (index % 32),
            "ignore_eos": True,
            "temperature": 0.0,
        }
        if index % 2:
            body |= {"temperature": 0.8, "top_k": 40, "seed": index}
        if index % 4 == 1:
            body["structured_outputs"] = {"json": ENDLESS}
        cases.append(Case(f"storm-{index}", body))
    return cases


async def _kill_in_mid_stream(stack: Stack, tap: Tap, cases: list[Case]) -> int:
    """SIGKILL the decode worker of the first stream that has enough tokens. Returns how many streams it had."""
    wanted = {case.request_id: case.body["max_tokens"] for case in cases}
    while True:
        for request_id in wanted.keys() & tap.requests.keys():
            attempt = tap.requests[request_id].last
            if attempt.tokens and KILL_AFTER_TOKENS <= max(attempt.tokens) < wanted[request_id] - 1:
                victim = attempt.workers["decode"]
                row = next(row for row in await stack.workers() if row["incarnation"] == f"{victim:016x}")
                os.kill(row["pid"], signal.SIGKILL)
                on_it = [tap.requests[name] for name in wanted.keys() & tap.requests.keys()]
                return sum(heard.on(victim) for heard in on_it)
        await asyncio.sleep(KILL_POLL_S)


def workload(prompts: Prompts, count: int) -> list[Case]:
    """Lengths spread evenly over their logarithm, both ends included; every third shares a prefix with an older one."""
    random = np.random.default_rng(5)
    lengths = np.geomspace(1, MAX_PROMPT, count).round().astype(int)
    random.shuffle(lengths)
    cases: list[Case] = []
    for index, length in enumerate(lengths.tolist()):
        prefix = None
        if index % 3 == 2:
            older = max((case.body["prompt"] for case in cases), key=len)
            prefix = older[: max(1, int(len(older) * random.uniform(0.3, 0.9)))]
        body: dict[str, Any] = {
            "prompt": prompts.tokens(length, prefix),
            # Short prompts get long answers, so that running sequences outgrow the pool.
            "max_tokens": int(random.integers(8, 48) if length > 512 else random.integers(128, 384)),
            "ignore_eos": True,
            "temperature": 0.0,
        }
        if index % 2:
            body |= {"temperature": 0.8, "top_p": 0.95, "seed": index}
        cases.append(Case(f"parity-{index}", body))
    return cases


async def _run(stack: Stack, cases: list[Case], concurrency: int) -> dict[str, Stream]:
    limit = asyncio.Semaphore(concurrency)

    async def one(case: Case) -> Stream:
        async with limit:
            return await stack.complete(case.body, request_id=case.request_id)

    streams = await asyncio.gather(*(one(case) for case in cases))
    return {case.request_id: stream for case, stream in zip(cases, streams, strict=True)}


def _complete(tap: Tap, case: Case, stream: Stream) -> Heard:
    """What the bus said of a request, which must be whole, free of contradictions and what the client was given."""
    heard = tap.requests[case.request_id]
    wanted, num_heard = case.body["max_tokens"], len(heard.generated)
    if heard.prompt != case.body["prompt"]:
        raise RuntimeError(f"{case.request_id}: another prompt")
    if num_heard != wanted or stream.usage is None or stream.usage["completion_tokens"] != wanted:
        raise RuntimeError(f"{case.request_id}: {num_heard} tokens on the bus, usage {stream.usage}, asked {wanted}")
    return heard


async def _add_transfers(report: Report, stack: Stack, cases: list[Case], *, quick: bool, kill: bool) -> None:
    """What the run exercised, and the digests of both pools. A worker that was killed took its counts along."""
    sent, fetched = await _both_digests(stack)
    prefill, decode = await stack.metrics("prefill"), await stack.metrics("decode")
    slots = {(ticket, token): digest for ticket, rows in fetched.items() for token, digest in rows.items()}
    differing = sum(sent.get(ticket, {}).get(token) != digest for (ticket, token), digest in slots.items())
    hits = {
        role: metric(samples, "kvferry_prefix_cache_hit_token_total")
        for role, samples in (("prefill", prefill), ("decode", decode))
    }
    received = metric(decode, "kvferry_kv_token_total", direction="received")
    prompt_tokens = sum(len(case.body["prompt"]) for case in cases)
    pulls = metric(decode, "kvferry_pull_total", outcome="received")
    report.add("pulls", pulls, "", 1 if kill else len(cases), at_least=True)
    # Every prompt token came over the data plane or lay in D's cache already; nothing was computed on D.
    found = received + hits["decode"]
    report.add("token slots fetched or found at D", found, "", 1 if kill else prompt_tokens, at_least=True)
    report.add("token slots fetched", received, "", 1, at_least=True)
    report.add("token slots compared", len(slots), "", 1, at_least=True)
    report.add("token slots that differ between the pools", differing, "", 0)
    report.add("prefix-cache hits on prefill", hits["prefill"], "tokens", 1, at_least=True)
    # With two, D's hits depend on which of them was chosen, and the killed one's are not known.
    report.add("prefix-cache hits on decode", hits["decode"], "tokens", None if kill else 1, at_least=True)
    preemptions = metric(prefill, "kvferry_preemption_total") + metric(decode, "kvferry_preemption_total")
    least = 1 if kill else MIN_QUICK_PREEMPTIONS if quick else MIN_PREEMPTIONS
    report.add("preemptions", preemptions, "", least, at_least=True)


async def _both_digests(stack: Stack) -> tuple[Digests, Digests]:
    """Digests of P and of D, once P has those of every pull that D finished: both work them out off the loop."""
    deadline = blocking_clock() + DIGESTS_TIMEOUT_S
    while True:
        sent, fetched = await pool_digests(stack, "prefill"), await pool_digests(stack, "decode")
        pulls = metric(await stack.metrics("decode"), "kvferry_pull_total", outcome="received")
        if (fetched.keys() <= sent.keys() and len(fetched) >= pulls) or blocking_clock() > deadline:
            return sent, fetched
        await asyncio.sleep(DIGESTS_POLL_S)


async def pool_digests(stack: Stack, role: str) -> Digests:
    """From all workers of a role."""
    merged: dict[str, dict[str, str]] = {}
    for document in await stack.worker_json(role, "/debug/digests"):
        merged |= document
    return merged
