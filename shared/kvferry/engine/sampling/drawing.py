"""Between a step's plan and the sampler: which sequences draw, and where the results go."""

from __future__ import annotations

from collections.abc import Mapping

from kvferry.engine.sampling.sampler import Drawn
from kvferry.schedule.step import Draw, Logprobs, StepPlan, StepResult
from kvferry.wire.logprobs import PromptLogprobs


def draws_of(plan: StepPlan) -> dict[int, Draw]:
    """Index of each sequence that draws -> its draw, in plan order."""
    return {index: step.draw for index, step in enumerate(plan.steps) if step.draw is not None}


def result_of(
    plan: StepPlan,
    draws: Mapping[int, Draw],
    drawn: Drawn,
    seconds: float,
    scored: Mapping[int, PromptLogprobs] | None = None,
) -> StepResult:
    """`drawn` holds one result for each of `draws`, `scored` those of some sequences by their index. What was drawn by
    a grammar that failed is left out; any other token is in its place from here on."""
    tokens: list[int | None] = [None] * len(plan.steps)
    logprobs: list[Logprobs | None] = [None] * len(plan.steps)
    for (index, draw), token, row in zip(draws.items(), drawn.tokens, drawn.logprobs, strict=True):
        if draw.mask is None or draw.mask.fault is None:
            tokens[index], logprobs[index] = token, row
            if draw.place is not None:
                draw.place[0] = token
    if all(row is None for row in logprobs):
        logprobs.clear()
    scores = tuple(scored.get(index) for index in range(len(plan.steps))) if scored else ()
    return StepResult(tuple(tokens), seconds, tuple(logprobs), scores)
