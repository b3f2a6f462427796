"""The grammars of a worker's sequences: compiled beside everything else, their masks made while a step runs.

    accepted ──grammar lane: compile, replay──> sequence.mask ──each step that draws──> mask lane, beside the engine
                          └─ failed ──────────────> dropped, reason "grammar" <──────────────┘

A sequence is scheduled meanwhile, but for its draw (`Sequence.num_rows`). The runner waits for a mask only when the
logits are there (`TokenMask.words`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvferry.grammar.compiler import GrammarCompiler, GrammarError
from kvferry.lane import Lane
from kvferry.log import get_logger
from kvferry.schedule.sequence import Dropped, Sequence
from kvferry.schedule.step import StepPlan, TokenMask
from kvferry.wire.fields import TokenArray, unpack_tokens

if TYPE_CHECKING:
    from kvferry.worker.worker import Worker

log = get_logger(__name__)


class Grammars:
    """Only the event loop calls it."""

    def __init__(self, worker: Worker[Any], compiler: GrammarCompiler | None) -> None:
        """Without a compiler there is no grammar that the worker could follow."""
        self._worker = worker
        self._compiler = compiler
        self._compile_lane: Lane = worker.runtime.lane("grammar", nice=5)
        self._mask_lane: Lane = worker.runtime.lane("mask")

    @property
    def followed(self) -> bool:
        return self._compiler is not None

    def accepted(self, sequence: Sequence) -> None:
        """A sequence was queued: give it a mask if its request has a grammar."""
        if sequence.work.sampling.grammar is not None:
            self._worker.tasks.spawn(self._compile(sequence), "grammar")

    def begin(self, plan: StepPlan) -> None:
        """The step is about to run: make the masks of its draws meanwhile."""
        masked = _masked(plan)
        for mask, _ in masked:
            mask.begin()
        if masked:
            self._mask_lane.run(_advance, masked)

    def ended(self, plan: StepPlan) -> None:
        """The step has run: give up the sequences whose grammar failed in it. What they drew is in no result."""
        if any(mask.fault is not None for mask, _ in _masked(plan)):
            for sequence in list(self._worker.scheduler.sequences.values()):
                if sequence.mask is not None and sequence.mask.fault is not None:
                    self._give_up(sequence, sequence.mask.fault)
                    self._compile_lane.run(self._forget, sequence)

    def close(self) -> None:
        """After the engine's last step."""
        self._compile_lane.close()
        self._mask_lane.close()

    async def _compile(self, sequence: Sequence) -> None:
        grammar = sequence.work.sampling.grammar
        assert grammar is not None
        try:
            if self._compiler is None:
                raise GrammarError("this worker follows no grammars")
            generated = unpack_tokens(sequence.work.generated)
            sequence.mask = await self._compile_lane.run(self._compiler.follow, grammar, generated)
        except GrammarError as error:
            self._give_up(sequence, error.reason)
        except Exception as error:  # or the sequence would wait for ever
            log.exception("grammar not compiled", request_id=sequence.work.request_id)
            self._give_up(sequence, type(error).__name__)
        self._worker.wake()

    def _forget(self, sequence: Sequence) -> None:
        """On the grammar lane."""
        if self._compiler is not None and sequence.work.sampling.grammar is not None:
            self._compiler.forget(sequence.work.sampling.grammar)

    def _give_up(self, sequence: Sequence, fault: str) -> None:
        if self._worker.scheduler.sequences.get(sequence.key) is sequence:
            self._worker.scheduler.cancel(sequence.key)
            self._worker.drop(Dropped(sequence, "grammar", fault))


def _masked(plan: StepPlan) -> list[tuple[TokenMask, TokenArray]]:
    """The masks of a step's draws, with the tokens that they stand behind."""
    draws = (step.draw for step in plan.steps if step.draw is not None)
    return [(draw.mask, draw.tokens[draw.num_prompt :]) for draw in draws if draw.mask is not None]


def _advance(masked: list[tuple[TokenMask, TokenArray]]) -> None:
    """On the mask lane."""
    for mask, generated in masked:
        mask.advance(generated)
