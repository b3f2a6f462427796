"""One sequence on one worker: its tokens, its block table, how far it is computed, and when it ends."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.kv.hashing import block_hashes, chain_hash, root_hash
from kvferry.schedule.step import BlockTable, Draw, Score, SequenceStep, TokenMask
from kvferry.trace.journal import Journal
from kvferry.wire.beats import SequenceState
from kvferry.wire.fields import unpack_tokens
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs
from kvferry.wire.tokens import EndReason, FinalReason
from kvferry.wire.work import Work

Key = tuple[bytes, int]  # (ticket, attempt)


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What ends a sequence, apart from its own sampling fields."""

    max_model_len: int
    eos_token_ids: frozenset[int]


class Sequence:
    """Tokens are prompt + generated; both buffers are append-only, so views of them may cross to the engine thread,
    which puts each drawn token into its place; it counts from `append_token` on.

    `num_computed` counts the tokens whose KV is in the blocks.
    """

    __slots__ = (
        "_table",
        "_tokens",
        "block_size",
        "blocked_since",
        "cached_tokens",
        "deadline",
        "doomed",
        "eos_token_ids",
        "hashes",
        "journal",
        "mask",
        "num_blocks",
        "num_computed",
        "num_context",
        "num_published",
        "num_tokens",
        "pins",
        "root",
        "sequence_id",
        "since",
        "spent",
        "state",
        "work",
    )

    def __init__(
        self,
        sequence_id: int,
        work: Work,
        kv_format_id: str,
        block_size: int,
        max_model_len: int,
        now: float,
        eos_token_ids: frozenset[int] = frozenset(),
    ) -> None:
        prompt, generated = unpack_tokens(work.prompt), unpack_tokens(work.generated)
        self.sequence_id = sequence_id
        self.work = work
        self.eos_token_ids = eos_token_ids  # not drawn before `min_tokens`
        self.block_size = block_size
        self.num_context = len(prompt) + len(generated)  # tokens that were there when the attempt began
        self.num_tokens = self.num_context
        remaining = max(0, work.sampling.max_tokens - len(generated))
        capacity = min(self.num_context + remaining, max(max_model_len, self.num_context)) + 1
        self._tokens = np.empty(capacity, dtype=np.uint32)
        self._tokens[: len(prompt)] = prompt
        self._tokens[len(prompt) : self.num_context] = generated
        self._table = np.zeros(-(-capacity // block_size) + 1, dtype=np.int32)
        self.num_blocks = 0
        self.num_computed = 0
        self.num_published = 0  # blocks that the prefix cache can find
        self.cached_tokens = 0
        self.root = root_hash(kv_format_id, "", work.salt)
        self.hashes: list[bytes] = block_hashes(self.root, self.context, block_size)
        self.mask: TokenMask | None = None  # of the request's grammar, once that is compiled
        self.state: SequenceState = "waiting"
        self.since = now  # when it entered its state; one that waits may wait for another reason meanwhile
        self.spent: dict[SequenceState, float] = {}  # seconds in the states that it has left
        self.journal: Journal | None = None  # None: its trace is not recorded
        self.blocked_since: float | None = None
        self.deadline = None if work.deadline is None else now + work.deadline
        # Engine steps and copies that use the blocks right now; freeing waits for them.
        self.pins = 0
        self.doomed = False

    @property
    def key(self) -> Key:
        return self.work.key

    @property
    def order(self) -> tuple[int, float, bytes]:
        return self.work.order

    @property
    def tokens(self) -> npt.NDArray[np.uint32]:
        """u32 [num_tokens]"""
        return self._tokens[: self.num_tokens]

    @property
    def num_prompt(self) -> int:
        """Tokens that the client sent; the others were generated, by whatever attempt."""
        return len(self.work.prompt) // 4

    @property
    def context(self) -> npt.NDArray[np.uint32]:
        """u32 [num_context]: the tokens whose KV a prefill computes."""
        return self._tokens[: self.num_context]

    @property
    def block_table(self) -> BlockTable:
        """i32 [num_blocks]"""
        return self._table[: self.num_blocks]

    @property
    def next_index(self) -> int:
        """Generated index, over all attempts, of the token that is drawn next."""
        return len(self.work.generated) // 4 + self.num_tokens - self.num_context

    @property
    def max_tokens_held(self) -> int:
        """Tokens whose KV the sequence holds at most: all of its longest run but the last, which ends it."""
        return self.num_context + max(0, self.work.sampling.max_tokens - len(self.work.generated) // 4 - 1)

    @property
    def max_hit(self) -> int:
        """Tokens that a prefix cache may give where the sequence is computed: the last one's logits give the next
        token, and a scored token needs those of the one before it."""
        scoring = self.work.scoring
        return self.num_context - 1 if scoring is None else min(self.num_context, scoring.start) - 1

    @property
    def draws(self) -> bool:
        """False: it ends when its prompt is scored."""
        return self.work.sampling.max_tokens > 0

    @property
    def is_scored(self) -> bool:
        """Whether a sequence that draws nothing has come to its end."""
        return not self.draws and self.num_computed >= self.num_context - 1

    @property
    def may_draw(self) -> bool:
        return self.draws and (self.mask is not None or self.work.sampling.grammar is None)

    @property
    def num_rows(self) -> int:
        """Tokens that may be rows of a step now; the last one draws, and waits for the grammar (or for ever)."""
        return self.num_tokens - self.num_computed - (0 if self.may_draw else 1)

    def enter(self, state: SequenceState, now: float) -> None:
        self.spent[self.state] = self.spent.get(self.state, 0.0) + now - self.since
        self.state, self.since = state, now

    def append_blocks(self, blocks: list[int]) -> None:
        self._table[self.num_blocks : self.num_blocks + len(blocks)] = blocks
        self.num_blocks += len(blocks)

    def append_token(self, token: int) -> None:
        self._tokens[self.num_tokens] = token
        self.num_tokens += 1
        if self.num_tokens % self.block_size == 0:
            parent = self.hashes[-1] if self.hashes else self.root
            block = self._tokens[self.num_tokens - self.block_size : self.num_tokens]
            self.hashes.extend(block_hashes(parent, block, self.block_size))

    def chain_hash(self, end: int) -> bytes:
        """Chain hash of the first `end` tokens; the partial tail counts as a shorter block."""
        full = end // self.block_size
        parent = self.hashes[full - 1] if full else self.root
        tail = self._tokens[full * self.block_size : end]
        return chain_hash(parent, tail, self.block_size, len(tail))

    def step(self, num_rows: int) -> SequenceStep:
        """The next `num_rows` tokens as rows of a step; draws when they reach the end."""
        start, end = self.num_computed, self.num_computed + num_rows
        draw = self._draw(self.next_index, end) if end == self.num_tokens else None
        return SequenceStep(self.sequence_id, self._tokens[start:end], start, self.block_table, draw, self._score(end))

    def step_ahead(self) -> SequenceStep:
        """The row of the token that the step under way draws, and the draw behind it."""
        start, end = self.num_tokens, self.num_tokens + 1
        draw = self._draw(self.next_index + 1, end)
        return SequenceStep(self.sequence_id, self._tokens[start:end], start, self.block_table, draw)

    def _draw(self, index: int, end: int) -> Draw:
        """Of the token at position `end`, which has the generated index `index`."""
        return Draw.of(
            self.work.sampling, self.work.choice, index, self._tokens[:end], self.num_prompt, self.eos_token_ids,
            self.mask, self._tokens[end : end + 1],
        )  # fmt: skip

    def _score(self, end: int) -> Score | None:
        """What the rows before position `end` tell of the prompt's tokens."""
        scoring = self.work.scoring
        if scoring is None:
            return None
        first = max(self.num_computed + 1, scoring.start)
        targets = self._tokens[first : min(end + 1, self.num_prompt)]
        return Score(first - 1 - self.num_computed, targets, scoring.num_top) if len(targets) else None

    @property
    def runs_freely(self) -> bool:
        """Whether its next step depends on nothing but the token drawn before."""
        return self.work.sampling.grammar is None and not self.work.alone

    def goes_on(self, limits: ModelLimits) -> bool:
        """Whether the token that is being drawn can't end the sequence by its length."""
        return self.next_index + 1 < self.work.sampling.max_tokens and self.num_tokens + 1 < limits.max_model_len

    def end_reason(self, token: int, limits: ModelLimits) -> FinalReason | None:
        """Why the sequence ends with `token`, which `append_token` has just added."""
        if self.work.sampling.is_end(token, limits.eos_token_ids):
            return "stop"
        if self.next_index >= self.work.sampling.max_tokens or self.num_tokens >= limits.max_model_len:
            return "length"
        return None


@dataclass(frozen=True, slots=True)
class Emission:
    """What a step gave one sequence: a token, log-probabilities of its prompt, or both. `reason` if that is all."""

    sequence: Sequence
    index: int
    token: int | None
    reason: FinalReason | None
    logprobs: TokenLogprobs | None = None  # if the request wants any
    scores: PromptLogprobs | None = None

    @property
    def first(self) -> bool:
        """Whether it has the first token of this attempt."""
        return self.token is not None and self.index * 4 == len(self.sequence.work.generated)

    @property
    def first_drawn(self) -> bool:
        """Whether it has the first token that this worker drew: the first one of a pull comes with it."""
        num_before = len(self.sequence.work.generated) // 4 + ("fetching" in self.sequence.spent)
        return self.token is not None and self.index == num_before


@dataclass(frozen=True, slots=True)
class Dropped:
    """A sequence that this worker gives up; the gateway places it again or ends it."""

    sequence: Sequence
    reason: EndReason
    detail: str = ""


def put_in_order(stage: dict[Key, Sequence], sequence: Sequence) -> None:
    """Add to a stage that is in the sequences' order: what is more urgent goes before what has begun already."""
    last = next(reversed(stage.values()), None)
    stage[sequence.key] = sequence
    if last is not None and last.order > sequence.order:
        in_order = sorted(stage.values(), key=lambda item: item.order)
        stage.clear()
        stage.update((item.key, item) for item in in_order)


def pick_alone(sequences: Iterable[Sequence], turn: int) -> list[Sequence]:
    """The sequences of the next step, where one that must run alone gets every other step to itself."""
    everyone = list(sequences)
    alone = [sequence for sequence in everyone if sequence.work.alone]
    if not alone:
        return everyone
    others = [sequence for sequence in everyone if not sequence.work.alone]
    if others and turn % 2:
        return others
    return [alone[turn // 2 % len(alone)]]
