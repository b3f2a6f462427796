"""What the clients of the chaos benchmark ask, and the right answers: those of an undisturbed single worker."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from bench.options import Options
from bench.prompts import Prompts
from bench.stack import running

MAX_MODEL_LEN: Final = 2048
CONCURRENCY: Final = 8
LONG_EVERY: Final = 3  # every third prompt is long
NEVER: Final = "\x00never"  # a stop string that no text holds: the stop path runs, and nothing is cut
SAMPLINGS: Final[tuple[dict[str, Any], ...]] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 40, "stop": [NEVER]},
    {"temperature": 1.0, "min_p": 0.05, "frequency_penalty": 0.5},
)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    body: dict[str, Any]
    is_long: bool

    @property
    def max_tokens(self) -> int:
        return int(self.body["max_tokens"])


@dataclass(frozen=True, slots=True)
class Right:
    """The answer that nothing disturbed."""

    text: str
    token_ids: list[int]


def workload(prompts: Prompts, count: int) -> list[Case]:
    """Short prompts with long answers and long prompts with short ones; greedy, seeded, with penalties and stops."""
    random = np.random.default_rng(11)
    cases = []
    for index in range(count):
        is_long = index % LONG_EVERY == LONG_EVERY - 1
        body = {
            "prompt": prompts.tokens(int(random.integers(500, 1000) if is_long else random.integers(20, 128))),
            "max_tokens": int(random.integers(8, 32) if is_long else random.integers(64, 192)),
            "ignore_eos": True,
            "seed": index,
            **SAMPLINGS[index % len(SAMPLINGS)],
        }
        cases.append(Case(f"case-{index}", body, is_long))
    return cases


async def undisturbed(options: Options, cases: list[Case]) -> dict[str, Right]:
    """The right answers, by the cases' names. Raises `RuntimeError` where the engine is not exact."""
    limit = asyncio.Semaphore(CONCURRENCY)
    flags = ("--prefill", "0", "--decode", "1", "--max-model-len", str(MAX_MODEL_LEN))
    async with running(options, *flags) as stack:
        if not all(row["exact"] for row in await stack.workers()):
            raise RuntimeError("no exact engine runs on this machine, so texts cannot be compared")

        async def one(case: Case) -> Right:
            async with limit:
                answer = await stack.complete({**case.body, "return_token_ids": True})
            return Right(answer.text, answer.token_ids)

        answers = await asyncio.gather(*(one(case) for case in cases))
    for case, answer in zip(cases, answers, strict=True):
        if len(answer.token_ids) != case.max_tokens:
            raise RuntimeError(f"{case.name}: {len(answer.token_ids)} tokens undisturbed, asked {case.max_tokens}")
    return {case.name: answer for case, answer in zip(cases, answers, strict=True)}
