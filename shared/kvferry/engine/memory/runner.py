"""The in-memory twin of a model: numpy alone, no weights, exact, and impossible to fool with wrong KV.

    state of position p     s[p] = mix(s[p - 1], token[p]), s[-1] from the format id
    KV of position p        lanes of s[p]: for each layer, key or value, head and dimension another mix
    next token              a digest of the KV bytes of the whole context, as they lie in the blocks

So KV depends on every token up to and including its position, and a step reads all of a sequence's KV through
its block table: one wrong, stale or misplaced byte changes the tokens from then on. `continuation` computes
the same tokens from the text alone.

With several ranks each has the KV of its heads, in memory that they share, and goes on from that alone; the runner is
their leader, as those of the real engines are, and draws from the KV of all.

Where a draw has a bias, a grammar or banned tokens, or wants log-probabilities, the digest makes a whole row of
logits. The token that it gives by itself is the row's best, so a feature changes nothing but what it is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import numpy.typing as npt

from kvferry.engine.columns import Columns, Wanted
from kvferry.engine.limits import Limits, slots_of
from kvferry.engine.memory.kv import Lanes, chain, expand, lanes_shape, mix
from kvferry.engine.memory.rank import MemoryCache, MemoryFollower
from kvferry.engine.ranks.caches import Caches, apart
from kvferry.engine.ranks.followers import Followers, Step
from kvferry.engine.ranks.shard import heads_of
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.sampling.drawing import draws_of, result_of
from kvferry.engine.sampling.penalties import adjust, adjusts
from kvferry.engine.sampling.sampler import Drawn, find_logprobs, greedy
from kvferry.engine.scoring import prompt_logprobs
from kvferry.schedule.step import (
    BlockTable,
    Draw,
    KVFormat,
    KVStore,
    Logprobs,
    SequenceStep,
    StepPlan,
    StepResult,
    TokenMask,
)
from kvferry.wire.frame import Piece
from kvferry.wire.logprobs import PromptLogprobs
from kvferry.wire.sampling import Sampling

GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """The shape of the twin, and how long its steps say that they took (nothing sleeps)."""

    num_blocks: int = 64
    block_size: int = 16
    max_model_len: int = 1024
    vocab_size: int = 256
    eos_token_ids: frozenset[int] = frozenset()
    num_layers: int = 2
    num_kv_heads: int = 2
    head_dim: int = 8
    dtype: str = "bfloat16"
    model: str = "memory"  # two models of different names have different KV and different tokens
    numerics: str = ""  # two numerics, too, though they say that their KV format is the same
    num_heads: int = 4  # query heads: what ranks split where there are fewer KV heads than ranks
    draws: str = ""  # two of these have equal KV, and other tokens: as close as `fast` asks for
    seconds_per_step: float = 0.0
    seconds_per_token: float = 0.0

    @property
    def kv_format(self) -> KVFormat:
        identity = (
            self.model, self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.block_size,
            self.vocab_size,
        )  # fmt: skip
        format_id = hashlib.sha256(repr(identity).encode()).hexdigest()[:32]
        return KVFormat(self.num_layers, self.num_kv_heads, self.head_dim, self.dtype, self.block_size, format_id)


class MemoryRunner:
    """Implements `ModelRunner`. `followers` are the other ranks, set up here and told here."""

    exact = True

    def __init__(
        self, settings: MemorySettings | None = None, followers: Followers | None = None, num_remote: int = 0
    ) -> None:
        """`num_remote`: how many of the ranks hand their KV over by themselves."""
        self._settings = settings = settings or MemorySettings()
        self._format = settings.kv_format
        self._root = root_state(settings)
        self.limits = Limits(self._format, settings.num_blocks, settings.max_model_len, settings.vocab_size)
        self._followers = followers
        if followers is None:
            self.caches = [MemoryCache(self._format, range(settings.num_kv_heads), settings.num_blocks)]
        else:
            followers.set_up("memory", {})
            ranks = range(followers.size)
            self.caches = [open_cache(settings, followers.size, rank, followers.memory) for rank in ranks]
            followers.ready()
        self._whole = Caches(self.caches, self.limits)
        num_here = len(self.caches) - num_remote
        self.here: KVStore = Caches(self.caches[:num_here], self.limits) if num_remote else self

    @property
    def kv_format(self) -> KVFormat:
        return self._format

    @property
    def heads(self) -> range:
        return self._format.all_heads

    @property
    def numerics_id(self) -> str:
        return f"memory1{self._settings.numerics}{self._settings.draws}-{self._settings.model}"

    @property
    def num_blocks(self) -> int:
        return self._settings.num_blocks

    @property
    def max_model_len(self) -> int:
        return self._settings.max_model_len

    @property
    def vocab_size(self) -> int:
        return self._settings.vocab_size

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._settings.eos_token_ids

    def execute(self, plan: StepPlan) -> StepResult:
        self.limits.check_plan(plan)
        drawing = draws_of(plan)
        with self._told(plan, drawing):
            self.caches[0].write(plan.steps, self._root)
        drawn = Drawn([], [])
        scored: dict[int, PromptLogprobs] = {}
        for index, step in enumerate(plan.steps):
            if step.draw is None and step.score is None:
                continue
            context = self._context(step)
            if step.draw is not None:
                token, logprobs = pick(context, step.draw, self._settings)
                drawn.tokens.append(token)
                drawn.logprobs.append(logprobs)
            if step.score is not None:
                rows = [
                    score(context[:, :, : step.start + row + 1], int(target), step.score.num_top, self._settings)
                    for row, target in zip(step.scored_rows, step.score.targets, strict=True)
                ]
                scored[index] = prompt_logprobs(step.scored_from, rows, step.score.num_top)
        seconds = self._settings.seconds_per_step + plan.num_tokens * self._settings.seconds_per_token
        return result_of(plan, drawing, drawn, seconds, scored)

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._whole.gather(piece, block_table, out)

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._whole.scatter(piece, block_table, payload)

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        self.caches.clear()

    def _told(self, plan: StepPlan, drawing: Mapping[int, Draw]) -> AbstractContextManager[None]:
        """Inside, the other ranks know the step."""
        if self._followers is None or not plan.steps:
            return nullcontext()
        wanted = [Wanted.LAST if index in drawing else Wanted.NONE for index in range(len(plan.steps))]
        return self._followers.told(Step(Columns.of(plan.steps, wanted).message(), bool(drawing)))

    def _context(self, step: SequenceStep) -> Lanes:
        """KV of all heads up to the end of a sequence's chunk."""
        slots = slots_of(step.block_table, 0, step.start + len(step.tokens), self._format.block_size)
        lanes = [cache.read(slots) for cache in apart(self.caches)]
        return lanes[0] if len(lanes) == 1 else np.concatenate(lanes, 3)


def memory_follower(settings: MemorySettings, size: int, rank: int, memory: SharedMemory) -> MemoryFollower:
    """A rank beside the leader of `size` ranks with these settings."""
    return MemoryFollower(open_cache(settings, size, rank, memory), root_state(settings))


def open_cache(settings: MemorySettings, size: int, rank: int, memory: SharedMemory) -> MemoryCache:
    """One rank's KV."""
    group = settings.num_heads // settings.num_kv_heads
    _, heads = heads_of(settings.num_kv_heads, group, size, rank)
    return MemoryCache(settings.kv_format, heads, settings.num_blocks, partial(memory.cache, rank))


def continuation(
    settings: MemorySettings, prompt: Sequence[int], sampling: Sampling, choice: int, count: int
) -> list[int]:
    """The next `count` tokens after `prompt`, from the text alone: what any run of it must produce."""
    return [token for token, _ in scored_continuation(settings, prompt, sampling, choice, count)]


def scored_continuation(
    settings: MemorySettings, prompt: Sequence[int], sampling: Sampling, choice: int, count: int
) -> list[tuple[int, Logprobs | None]]:
    """`continuation` with the log-probabilities that `sampling` asks for."""
    return list(drawn_tokens(settings, prompt, sampling, choice, count))


def drawn_tokens(
    settings: MemorySettings,
    prompt: Sequence[int],
    sampling: Sampling,
    choice: int,
    count: int,
    mask: TokenMask | None = None,
) -> Iterator[tuple[int, Logprobs | None]]:
    """The same, one by one, whatever ends the text; `mask`: of the grammar of `sampling`, which must not go on then."""
    kv_format = settings.kv_format
    states = chain(root_state(settings), np.asarray(prompt, np.uint32))
    tokens = np.empty(len(prompt) + count, np.uint32)
    tokens[: len(prompt)] = prompt
    lanes = np.empty(lanes_shape(kv_format, len(tokens)), np.uint8)
    lanes[:, :, : len(prompt)] = expand(kv_format, states)
    for index in range(count):
        end = len(prompt) + index
        if mask is not None:
            mask.advance(tokens[len(prompt) : end])
        draw = Draw.of(sampling, choice, index, tokens[:end], len(prompt), settings.eos_token_ids, mask)
        tokens[end], _ = picked = pick(lanes[:, :, :end], draw, settings)
        yield picked
        states = chain(states[-1], tokens[end : end + 1])
        lanes[:, :, end] = expand(kv_format, states)[:, :, 0]


def scored_prompt(settings: MemorySettings, prompt: Sequence[int], num_top: int) -> list[Logprobs]:
    """The log-probabilities of all of a prompt's tokens but the first, from the text alone."""
    states = chain(root_state(settings), np.asarray(prompt, np.uint32))
    lanes = expand(settings.kv_format, states)
    return [score(lanes[:, :, :end], prompt[end], num_top, settings) for end in range(1, len(prompt))]


def root_state(settings: MemorySettings) -> np.uint64:
    name = settings.kv_format.format_id + settings.numerics
    return np.uint64(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def pick(context: Lanes, wanted: Draw, settings: MemorySettings) -> tuple[int, Logprobs | None]:
    """The token after a context: greedy depends on the KV alone, a draw also on (seed, choice, index), and one
    with penalties on what they count. With its log-probabilities where they are wanted."""
    digest = hashlib.blake2b(np.ascontiguousarray(context).data, digest_size=8)
    digest.update((settings.numerics + settings.draws).encode())
    if wanted.sampling.temperature > 0:
        digest.update(repr((wanted.sampling.seed, wanted.choice, wanted.index)).encode())
    if wanted.sampling.penalised:
        generated = np.ascontiguousarray(wanted.tokens[wanted.num_prompt :])
        digest.update(repr((len(generated), wanted.num_prompt)).encode() + generated.data)
    value = int.from_bytes(digest.digest(), "little")
    token = value % settings.vocab_size
    unpenalised = Draw(  # penalties are in the digest
        GREEDY, wanted.choice, wanted.index, logit_bias=wanted.logit_bias, banned=wanted.banned, mask=wanted.mask
    )
    if not adjusts(unpenalised) and wanted.num_logprobs is None:
        return token, None
    if adjusts(unpenalised):
        token = greedy(adjust(logits_row(value, settings.vocab_size), unpenalised))
    count = wanted.num_logprobs
    return token, None if count is None else _logprobs(value, token, count, settings.vocab_size)


def score(context: Lanes, target: int, num_top: int, settings: MemorySettings) -> Logprobs:
    """How likely a known token is after a context."""
    digest = hashlib.blake2b(np.ascontiguousarray(context).data, digest_size=8)
    digest.update((settings.numerics + settings.draws).encode())
    value = int.from_bytes(digest.digest(), "little")
    return _logprobs(value, target, num_top, settings.vocab_size)


@lru_cache(1 << 14)  # whoever has the same context asks for the same: another worker, or the check of its answer
def _logprobs(value: int, token: int, num_top: int, vocab_size: int) -> Logprobs:
    return find_logprobs(logits_row(value, vocab_size), token, num_top)


def logits_row(value: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """Logits [vocab] in [-4, 4) that follow from a digest's value, and 4 for the token that it gives by itself."""
    words = mix(np.arange(vocab_size, dtype=np.uint64) ^ np.uint64(value))
    row = (words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 21) - np.float32(4)
    row[value % vocab_size] = 4
    return row
