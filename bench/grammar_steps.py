"""Decode steps of the native engine with the masks of a grammar made beside them and without, as a worker runs them."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Final, Self

import numpy as np

from bench.engine import CONTEXT, prompt, tables
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.grammar.compiler import GrammarCompiler
from kvferry.grammar.mask import GrammarMask
from kvferry.lane import ThreadLane
from kvferry.schedule.step import NO_TOKENS, BlockTable, Draw, SequenceStep, StepPlan
from kvferry.wire.fields import TokenArray
from kvferry.wire.sampling import Grammar, Sampling

STREAMS: Final = (1, 8, 24)
STEPS: Final = 40  # of one turn
# It goes on for longer than any turn.
GRAMMAR: Final = Grammar(
    "json",
    '{"type": "array", "minItems": 1000, "items": {"type": "object", "properties": {"name": {"type": "string"}, '
    '"score": {"type": "number"}, "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}}}, '
    '"required": ["name", "score", "tags"], "additionalProperties": false}}',
)


@dataclass(slots=True)
class Turns:
    """Seconds of each step, and of making the masks of those that have any."""

    free: list[float] = field(default_factory=list)
    masked: list[float] = field(default_factory=list)
    making: list[float] = field(default_factory=list)

    @property
    def longer(self) -> float:
        """By what share of a step a step with masks is longer than the one beside it, at the median."""
        return median(masked / free for free, masked in zip(self.free, self.masked, strict=True)) - 1

    @property
    def making_share(self) -> float:
        return median(self.making) / median(self.free)


@dataclass(slots=True)
class _Stream:
    table: BlockTable
    text: TokenArray  # prompt and what was generated, with room for all steps
    sampling: Sampling
    mask: GrammarMask | None


class Steps:
    """One runner and its two threads."""

    def __init__(self, model_dir: Path) -> None:
        settings = EngineSettings(model_dir, num_blocks=1024, max_model_len=2048, threads=1)
        self._runner = NativeRunner(settings)
        self._runner.warm_up()
        self._compiler = GrammarCompiler(
            model_dir / "tokenizer.json", self._runner.vocab_size, self._runner.eos_token_ids
        )
        self.numerics_id = self._runner.numerics_id

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._runner.close()

    def turns(self, streams: int, rounds: int) -> Turns:
        """Steps of so many streams, one without a grammar and one with, in turn."""
        return asyncio.run(self._turns(streams, rounds))

    async def _turns(self, streams: int, rounds: int) -> Turns:
        engine, making = ThreadLane("engine"), ThreadLane("mask")
        turns = Turns()
        for number in range(rounds):
            block_tables = tables(self._runner, 2 * streams, CONTEXT + STEPS)
            free = self._begin(number, block_tables[:streams], with_grammar=False)
            masked = self._begin(number, block_tables[streams:], with_grammar=True)
            for index in range(STEPS):
                # Whoever goes second finds the caches as the other has left them.
                for batch in (free, masked) if index % 2 else (masked, free):
                    seconds = await self._step(batch, index, turns.making, engine, making)
                    (turns.masked if batch is masked else turns.free).append(seconds)
        engine.close()
        making.close()
        return turns

    def _begin(self, number: int, block_tables: list[BlockTable], *, with_grammar: bool) -> list[_Stream]:
        """Streams whose prompts are computed but for the last token."""
        streams = []
        for place, table in enumerate(block_tables):
            text = np.concatenate((prompt(CONTEXT, self._runner.vocab_size), np.zeros(STEPS, np.uint32)))
            mask = self._compiler.follow(GRAMMAR, NO_TOKENS) if with_grammar else None
            self._runner.execute(StepPlan((SequenceStep(place, text[: CONTEXT - 1], 0, table),)))
            streams.append(_Stream(table, text, Sampling(temperature=1.0, seed=number * 1000 + place), mask))
        return streams

    async def _step(
        self, streams: list[_Stream], index: int, alone: list[float], engine: ThreadLane, making: ThreadLane
    ) -> float:
        """Seconds of one step. Those of making its masks go to `alone`."""
        end = CONTEXT + index
        steps = [
            SequenceStep(
                place, each.text[end - 1 : end], end - 1, each.table,
                Draw(each.sampling, 0, index, each.text[:end], CONTEXT, mask=each.mask),
            )
            for place, each in enumerate(streams)
        ]  # fmt: skip
        masks = [each.mask for each in streams if each.mask is not None]
        began = time.perf_counter()
        for mask in masks:
            mask.begin()
        if masks:
            making.run(_make, masks, [each.text[CONTEXT:end] for each in streams], alone)
        result = await engine.run(self._runner.execute, StepPlan(tuple(steps)))
        seconds = time.perf_counter() - began
        for each, token in zip(streams, result.tokens, strict=True):
            assert token is not None, "its grammar failed"
            each.text[end : end + 1] = token
        return seconds


def _make(masks: list[GrammarMask], generated: list[TokenArray], seconds: list[float]) -> None:
    began = time.perf_counter()
    for mask, tokens in zip(masks, generated, strict=True):
        mask.advance(tokens)
    seconds.append(time.perf_counter() - began)
