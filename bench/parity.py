"""Is what a disaggregated stack says right, to the byte and to the token? In three steps:

1. The pools: every token slot that D fetched holds the bytes that it had at P, by a digest over both pools.
2. The reference pass: a teacher-forced pass over each finished text accepts every token.
3. The single worker: how many of its texts are equal (in `fast`, near-ties may part them).

The workload has shared prefixes, mixed lengths, greedy and seeded draws, and pools too small for all of it
at once. What it was meant to exercise must have happened, or the run fails: a check of nothing is no check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np

from bench.client import Stream
from bench.options import Options
from bench.prompts import Prompts
from bench.reference import flipped_bit_is_seen, largest_gap, swapped_token_is_refused
from bench.report import Report
from bench.stack import Stack, metric, running
from bench.tap import Heard, Tap, tapped
from kvferry.engine.reference import EPSILON
from kvferry.runtime import blocking_clock

REQUESTS: Final = 64
QUICK_REQUESTS: Final = 16
CONCURRENCY: Final = 12
MAX_PROMPT: Final = 4000
NUM_BLOCKS: Final = 290  # 4,640 tokens: one long prompt and a few short ones
MAX_MODEL_LEN: Final = 4608
SETTINGS: Final = {
    "local_prefill_threshold": "0",
    "debug_digests": "true",
    "num_blocks": str(NUM_BLOCKS),
}
DIGESTS_TIMEOUT_S: Final = 10.0
DIGESTS_POLL_S: Final = 0.2

Digests: TypeAlias = Mapping[str, Mapping[str, str]]  # ticket (hex) -> token position -> digest of that slot


@dataclass(frozen=True, slots=True)
class Case:
    request_id: str
    body: dict[str, Any]


async def measure(options: Options) -> Report:
    report = Report(
        "parity",
        {
            "level": "fast",
            "workload": f"prompts of 1 to {MAX_PROMPT} tokens, {CONCURRENCY} at once, half greedy, half seeded",
            "pools": f"{NUM_BLOCKS} blocks on each worker, local prefill off",
        },
    )
    cases = workload(Prompts(options.model_dir, seed=4), QUICK_REQUESTS if options.quick else REQUESTS)
    length = ("--max-model-len", str(MAX_MODEL_LEN))
    async with running(options, *length, settings=SETTINGS) as stack, tapped(stack.run_file) as tap:
        apart = await _run(stack, cases)
        await _add_transfers(report, stack, cases)
    single_settings = {**SETTINGS, "debug_digests": "false"}
    async with running(options, *length, "--prefill", "0", "--decode", "1", settings=single_settings) as stack:
        single = await _run(stack, cases)
    heard = [_complete(tap, case, apart[case.request_id]) for case in cases]
    report.add("requests", len(cases), "", QUICK_REQUESTS if options.quick else REQUESTS, at_least=True)
    report.add("tokens judged", sum(len(one.tokens) for one in heard))
    report.add("attempts beyond the first", sum(len(one.attempts) - 1 for one in heard))
    gap = await asyncio.get_running_loop().run_in_executor(None, largest_gap, options.model_dir, MAX_MODEL_LEN, heard)
    report.add("largest gap of the reference pass", gap, "logit", EPSILON)
    report.add(
        "control: a token beyond ε is refused", swapped_token_is_refused(options.model_dir, heard[0]), "", 1, True
    )
    report.add("control: one flipped bit is seen", flipped_bit_is_seen(options.model_dir, heard[0]), "", 1, True)
    equal = sum(apart[case.request_id].text == single[case.request_id].text for case in cases)
    report.add("texts equal to the single worker's", equal)
    return report


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


async def _run(stack: Stack, cases: list[Case]) -> dict[str, Stream]:
    limit = asyncio.Semaphore(CONCURRENCY)

    async def one(case: Case) -> Stream:
        async with limit:
            return await stack.complete(case.body, request_id=case.request_id)

    streams = await asyncio.gather(*(one(case) for case in cases))
    return {case.request_id: stream for case, stream in zip(cases, streams, strict=True)}


def _complete(tap: Tap, case: Case, stream: Stream) -> Heard:
    """What the bus said of a request, which must be whole, free of contradictions and what the client was given."""
    heard = tap.requests[case.request_id]
    wanted = case.body["max_tokens"]
    if heard.prompt != case.body["prompt"] or heard.contradictions:
        raise RuntimeError(f"{case.request_id}: another prompt, or {heard.contradictions} indices with two tokens")
    if len(heard.generated) != wanted or stream.usage is None or stream.usage["completion_tokens"] != wanted:
        raise RuntimeError(
            f"{case.request_id}: {len(heard.tokens)} tokens on the bus, usage {stream.usage}, asked {wanted}"
        )
    return heard


async def _add_transfers(report: Report, stack: Stack, cases: list[Case]) -> None:
    """What the run exercised, and the digests of both pools."""
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
    report.add("pulls", pulls, "", len(cases), at_least=True)
    # Every prompt token came over the data plane or lay in D's cache already; nothing was computed on D.
    report.add("token slots fetched or found at D", received + hits["decode"], "", prompt_tokens, at_least=True)
    report.add("token slots fetched", received, "", 1, at_least=True)
    report.add("token slots compared", len(slots), "", 1, at_least=True)
    report.add("token slots that differ between the pools", differing, "", 0)
    for role, tokens in hits.items():
        report.add(f"prefix-cache hits on {role}", tokens, "tokens", 1, at_least=True)
    preemptions = metric(prefill, "kvferry_preemption_total") + metric(decode, "kvferry_preemption_total")
    report.add("preemptions", preemptions, "", 1, at_least=True)


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
