"""What the hand-off costs a client: time to the second token, disaggregated against one worker.

Token 0 does not wait for the transfer, so the second token is the first that shows it. Both set-ups run at
the same time and idle but for the one request under way; every prompt goes to both, in alternating order.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Final

from bench import handoff
from bench.options import Options
from bench.prompts import Prompts
from bench.report import Report
from bench.stack import Metrics, Stack, metric, running
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner

PAIRS: Final = 20
QUICK_PAIRS: Final = 3
WARM_UP_PAIRS: Final = 2
LIMITS: Final = {2048: 0.03, 512: 0.05}  # of the single worker's time
TAIL_LIMIT: Final = 0.03  # of the prompt's prefill time
TAIL: Final = "kvferry_handoff_tail_seconds"


async def measure(options: Options) -> Report:
    report = Report(
        "handoff_cost",
        {
            "threads": "1 per worker",
            "cores": "P and the single worker on core 0; D, both gateways, both NATS servers and the client on core 1",
            "local prefill": "off (threshold 0)",
        },
    )
    prompts = Prompts(options.model_dir, seed=2)
    num_pairs = QUICK_PAIRS if options.quick else PAIRS
    token_bytes = TorchRunner(EngineSettings(options.model_dir, num_blocks=1)).kv_format.token_bytes
    rate = await handoff.whole_rate(options, "ucx", handoff.NUM_TOKENS * token_bytes)
    async with (
        running(options, "--threads", "1", settings={"local_prefill_threshold": "0"}) as apart,
        running(options, "--threads", "1", "--prefill", "0", "--decode", "1") as single,
    ):
        await apart.pin({"prefill": [0], "": [1]})
        await single.pin({"decode": [0], "": [1]})
        for length, limit in LIMITS.items():
            await _pairs(prompts, length, WARM_UP_PAIRS, apart, single)
            before = await _both(apart)
            pairs = await _pairs(prompts, length, num_pairs, apart, single)
            after = await _both(apart)
            _require_transfers(before[1], after[1], len(pairs), length)
            _add(report, length, limit, pairs)
            tail = _mean_tail(before[0], after[0])
            prefill = statistics.median(one for _, one in pairs)
            report.add(
                f"{length} tokens: tail of the hand-off", tail * 1e3, "ms", _tail_limit(before, after, rate) * 1e3
            )
            report.add(f"{length} tokens: tail of the hand-off ÷ prefill time", tail / prefill, "", TAIL_LIMIT)
    return report


async def _pairs(prompts: Prompts, length: int, count: int, apart: Stack, single: Stack) -> list[tuple[float, float]]:
    """(disaggregated, single) seconds to the second token of the same prompt."""
    pairs = []
    for index in range(count):
        prompt = prompts.tokens(length)
        if index % 2:
            other = await _second_token_s(single, prompt)
            pairs.append((await _second_token_s(apart, prompt), other))
        else:
            pairs.append((await _second_token_s(apart, prompt), await _second_token_s(single, prompt)))
    return pairs


async def _second_token_s(stack: Stack, prompt: list[int]) -> float:
    result = await stack.complete({"prompt": prompt, "max_tokens": 4, "temperature": 0, "ignore_eos": True})
    return result.arrivals[1] - result.sent


def _add(report: Report, length: int, limit: float, pairs: Sequence[tuple[float, float]]) -> None:
    # The median of ratios within pairs: a slow minute slows both halves of a pair.
    cost = statistics.median(one / other for one, other in pairs) - 1
    report.add(f"{length} tokens: disaggregated", statistics.median(one for one, _ in pairs) * 1e3, "ms")
    report.add(f"{length} tokens: single worker", statistics.median(other for _, other in pairs) * 1e3, "ms")
    report.add(f"{length} tokens: cost of the hand-off", cost, "", limit)
    report.raw[str(length)] = pairs


def _require_transfers(before: Metrics, after: Metrics, count: int, length: int) -> None:
    """A figure about transfers is worthless if nothing was transferred."""
    name = "kvferry_kv_token_total"
    moved = metric(after, name, direction="received") - metric(before, name, direction="received")
    if moved < count * (length - 1):
        raise RuntimeError(f"{count} prompts of {length} tokens moved the KV of {moved:.0f} tokens only")


async def _both(stack: Stack) -> tuple[Metrics, Metrics]:
    return await stack.metrics("prefill"), await stack.metrics("decode")


def _tail_limit(before: tuple[Metrics, Metrics], after: tuple[Metrics, Metrics], rate: float) -> float:
    """1.5 × the last piece ÷ the rate of whole hand-offs just measured, + 5 ms. A piece is what one step computed."""

    def risen(side: int, name: str, **labels: str) -> float:
        return metric(after[side], name, **labels) - metric(before[side], name, **labels)

    piece = risen(1, "kvferry_kv_bytes_total", direction="received") / risen(0, "kvferry_step_seconds_count")
    return 1.5 * piece / rate + 5e-3


def _mean_tail(before: Metrics, after: Metrics) -> float:
    count = metric(after, f"{TAIL}_count") - metric(before, f"{TAIL}_count")
    return (metric(after, f"{TAIL}_sum") - metric(before, f"{TAIL}_sum")) / count if count else float("nan")
