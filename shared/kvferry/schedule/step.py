"""The engine's boundary: an immutable `StepPlan` in, a `StepResult` out.

`ModelRunner` is implemented by `engine/native/runner.py` (C++), `engine/torch/runner.py` (torch) and
`engine/memory/runner.py` (the in-memory twin, numpy alone). One call of `execute` is one engine step with any mix of
prefill chunks and decoding sequences; it runs on the engine thread. `gather` and `scatter` move KV between blocks
and staging slots and may run on another thread at the same time, on blocks that the running step does not write.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from kvferry.wire.fields import TokenArray
from kvferry.wire.frame import DTYPE_BYTES, Piece
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs
from kvferry.wire.sampling import MAX_LOGPROBS as MAX_LOGPROBS
from kvferry.wire.sampling import Sampling

BlockTable: TypeAlias = npt.NDArray[np.int32]  # [num_blocks of the sequence]: block ids, by position
# [ceil(vocab / 32)]: bit t % 32 of word t // 32 says whether token t may be drawn; at least one may.
MaskWords: TypeAlias = npt.NDArray[np.uint32]
NO_TOKENS: Final[TokenArray] = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True)
class KVFormat:
    """Shape and meaning of KV in blocks and frames. `format_id` is what P and D compare."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # "bfloat16" | "float16" | "float32"
    block_size: int
    format_id: str  # names weights, dtype, KV dtype, RoPE and block size

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers."""
        return self.num_layers * self.layer_token_bytes(self.all_heads)

    def layer_token_bytes(self, heads: range) -> int:
        """KV bytes of some heads of one token, in one layer."""
        return 2 * len(heads) * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def all_heads(self) -> range:
        """KV heads of the whole model."""
        return range(self.num_kv_heads)


class TokenMask(Protocol):
    """What a grammar lets a sequence draw next. It may still be in the making, on another thread, while the step's
    forward pass runs. `kvferry.grammar.mask` implements it."""

    def begin(self) -> None:
        """`advance` will be called, by another thread; until it has ended `words` waits."""

    def advance(self, generated: TokenArray) -> None:
        """Make the mask of the draw behind the generated tokens [num_generated]. Never raises."""

    def words(self) -> MaskWords | None:
        """None: any token may be drawn. Never raises."""

    @property
    def fault(self) -> str | None:
        """Why the grammar can't be followed, once `words` has returned: then what was drawn is worth nothing."""


@dataclass(frozen=True, slots=True)
class Draw:
    """Sample one token after the last row of a sequence's chunk.

    The uniform is Philox4x32-10 with key = seed and counter = (choice, index).
    """

    sampling: Sampling
    choice: int
    index: int  # generated index of the token that is drawn
    # What penalties count: prompt and generated tokens so far, a view that the draw does not own. u32 [num_tokens]
    tokens: TokenArray = field(default_factory=lambda: NO_TOKENS, compare=False)
    num_prompt: int = 0  # of `tokens`
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, what is added to its logit)
    banned: tuple[int, ...] = ()  # tokens that must not be drawn
    num_logprobs: int | None = None  # None: no log-probability wanted; n: the drawn token's, and the n best tokens'
    mask: TokenMask | None = field(default=None, compare=False)  # None: no grammar
    # Where the token is put as soon as it is drawn: a step that was planned ahead reads it there. u32 [1]
    place: TokenArray | None = field(default=None, compare=False)

    @classmethod
    def of(
        cls,
        sampling: Sampling,
        choice: int,
        index: int,
        tokens: TokenArray,
        num_prompt: int,
        eos_token_ids: frozenset[int] = frozenset(),
        mask: TokenMask | None = None,
        place: TokenArray | None = None,
    ) -> Draw:
        """The draw that a request's sampling asks for at a generated index. `tokens`: prompt and text before it."""
        return cls(
            sampling, choice, index, tokens, num_prompt, sampling.logit_bias,
            sampling.banned_at(index, eos_token_ids), sampling.num_logprobs, mask, place,
        )  # fmt: skip

    def allowed(self) -> MaskWords | None:
        """What `mask` allows without the banned tokens, unless they are all that it allows: the grammar comes first."""
        words = None if self.mask is None else self.mask.words()
        if words is None or not self.banned:
            return words
        banned = np.asarray(self.banned, np.uint32)
        kept = words.copy()
        np.bitwise_and.at(kept, banned >> 5, ~(np.uint32(1) << (banned & 31)))
        return kept if kept.any() else words


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities beside a drawn token, of the raw logits: before bans, biases, penalties and temperature."""

    logprob: float  # of the drawn token
    rank: int  # tokens whose logit is at least the drawn token's, itself included: 1 for the best
    top_tokens: tuple[int, ...]  # by (logit descending, id ascending)
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """Tell how likely known tokens are: `targets[i]` after row `first_row + i` of a sequence's chunk."""

    first_row: int
    targets: TokenArray  # [num_scored], at least one
    num_top: int  # best tokens told beside each one


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """One sequence's rows in a step: `tokens` at positions `start`, `start + 1`, …

    KV of the positions before `start` is in the blocks already; KV of these rows is written by the step.
    """

    sequence_id: int
    tokens: npt.NDArray[np.uint32]  # [num_rows]
    start: int
    block_table: BlockTable
    draw: Draw | None = None
    score: Score | None = None

    @property
    def scored_rows(self) -> range:
        """Rows of the chunk whose next tokens are scored."""
        score = self.score
        return range(0) if score is None else range(score.first_row, score.first_row + len(score.targets))

    @property
    def scored_from(self) -> int:
        """Position of the first token that is scored."""
        return self.start + self.scored_rows.start + 1


@dataclass(frozen=True, slots=True)
class StepPlan:
    steps: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(step.tokens) for step in self.steps)


@dataclass(frozen=True, slots=True)
class StepResult:
    tokens: tuple[int | None, ...]  # drawn token of each SequenceStep, in plan order; None without a draw
    seconds: float  # spent inside the runner
    logprobs: tuple[Logprobs | None, ...] = ()  # of each SequenceStep, or empty if no draw wanted any
    scores: tuple[PromptLogprobs | None, ...] = ()  # of each SequenceStep, or empty if none was to be scored

    def logprobs_of(self, place: int) -> TokenLogprobs | None:
        """What goes to the client of the SequenceStep at a place of the plan."""
        found = self.logprobs[place] if self.logprobs else None
        return None if found is None else TokenLogprobs(found.logprob, found.top_tokens, found.top_logprobs)

    def scores_of(self, place: int) -> PromptLogprobs | None:
        """Of the SequenceStep at a place of the plan."""
        return self.scores[place] if self.scores else None


class KVStore(Protocol):
    """Blocks of KV, of all heads of a model or some, that are copied to frames and from them."""

    @property
    def kv_format(self) -> KVFormat: ...

    @property
    def heads(self) -> range:
        """Those of the whole model that it has."""

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        """Copy KV of a piece from blocks to `out` (exactly `piece.num_bytes(...)` long) in the frame's layout."""

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        """The reverse of `gather`."""


class ModelRunner(KVStore, Protocol):
    """A model with its paged KV cache. Not thread-safe but where the module docstring says so."""

    @property
    def here(self) -> KVStore:
        """The part of its KV that lies on this host: all of it, but where ranks are on other hosts."""

    @property
    def numerics_id(self) -> str:
        """Names what the bits of a result depend on: engine version, kernels, instruction set, dtype, shards."""

    @property
    def exact(self) -> bool:
        """True if a row's bits depend on that row alone, whatever the batch, chunk or cached prefix."""

    @property
    def num_blocks(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_token_ids(self) -> frozenset[int]: ...

    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Raises RuntimeError for a plan outside the cache; the cache is then undefined only
        in the blocks that the plan names."""

    def warm_up(self) -> None:
        """Run what makes the first real step as fast as the later ones. Uses no block that is in use."""

    def close(self) -> None:
        """Free the model's memory. Nothing may be called afterwards."""
