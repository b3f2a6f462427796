"""The in-memory twin of a model: numpy alone, no weights, exact, and impossible to fool with wrong KV.

    state of position p     s[p] = mix(s[p - 1], token[p]), s[-1] from the format id
    KV of position p        lanes of s[p]: for each layer, key or value, head and dimension another mix
    next token              a digest of the KV bytes of the whole context, as they lie in the blocks

So KV depends on every token up to and including its position, and a step reads all of a sequence's KV through
its block table: one wrong, stale or misplaced byte changes the tokens from then on. `continuation` computes
the same tokens from the text alone.

Where a draw has a bias, a grammar or banned tokens, or wants log-probabilities, the digest makes a whole row of
logits. The token that it gives by itself is the row's best, so a feature changes nothing but what it is for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvferry.engine.drawing import draws_of, result_of
from kvferry.engine.limits import Limits, Slots, slots_of
from kvferry.engine.penalties import adjust, adjusts
from kvferry.engine.sampler import Drawn, find_logprobs, greedy
from kvferry.engine.scoring import prompt_logprobs
from kvferry.schedule.step import BlockTable, Draw, KVFormat, Logprobs, StepPlan, StepResult, TokenMask
from kvferry.wire.frame import DTYPE_BYTES, Piece
from kvferry.wire.logprobs import PromptLogprobs
from kvferry.wire.messages import Sampling

Lanes = npt.NDArray[np.uint8]  # [layers, 2, positions, kv_heads, head_dim * itemsize]: raw bytes

_MIX_A = np.uint64(0xBF58476D1CE4E5B9)  # constants of splitmix64
_MIX_B = np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_UNMIX_A = np.uint64(pow(int(_MIX_A), -1, 1 << 64))
_UNMIX_B = np.uint64(pow(int(_MIX_B), -1, 1 << 64))
_A_INT, _B_INT, _STEP_INT, _WORD = int(_MIX_A), int(_MIX_B), int(_STEP), (1 << 64) - 1
GREEDY = Sampling(temperature=0.0)
_UNWRITTEN = 0xFF  # NaN in every float format, and no state that a sequence has


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
    """Implements `ModelRunner`."""

    exact = True

    def __init__(self, settings: MemorySettings | None = None) -> None:
        self._settings = settings = settings or MemorySettings()
        self._format = settings.kv_format
        self._limits = Limits(self._format, settings.num_blocks, settings.max_model_len, settings.vocab_size)
        # [layers, 2, num_slots, kv_heads, head_dim * itemsize]
        self._blocks: Lanes = np.full(
            lanes_shape(self._format, settings.num_blocks * settings.block_size), _UNWRITTEN, np.uint8
        )

    @property
    def kv_format(self) -> KVFormat:
        return self._format

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
        self._limits.check_plan(plan)
        drawn = Drawn([], [])
        scored: dict[int, PromptLogprobs] = {}
        for index, step in enumerate(plan.steps):
            end = step.start + len(step.tokens)
            slots = self._slots(step.block_table, 0, end)
            before = self._read_state(slots[step.start - 1]) if step.start else root_state(self._settings)
            lanes = expand(self._format, chain(before, step.tokens))
            self._blocks[:, :, slots[step.start :]] = lanes
            context = self._blocks[:, :, slots]
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
        return result_of(plan, draws_of(plan), drawn, seconds, scored)

    def gather(self, piece: Piece, block_table: BlockTable, out: memoryview) -> None:
        self._limits.check_piece(piece, block_table, out.nbytes)
        frame = self._frame(piece, out)
        slots = self._slots(block_table, piece.token_start, piece.token_end)
        layers = self._blocks[piece.layer_start : piece.layer_end, :, :, piece.head_start : piece.head_end]
        frame[...] = layers[:, :, slots]

    def scatter(self, piece: Piece, block_table: BlockTable, payload: memoryview) -> None:
        self._limits.check_piece(piece, block_table, payload.nbytes)
        frame = self._frame(piece, payload)
        slots = self._slots(block_table, piece.token_start, piece.token_end)
        layers = self._blocks[piece.layer_start : piece.layer_end, :, :, piece.head_start : piece.head_end]
        layers[:, :, slots] = frame

    def warm_up(self) -> None:
        """Nothing to warm."""

    def close(self) -> None:
        self._blocks = np.empty(lanes_shape(self._format, 0), np.uint8)

    def _slots(self, block_table: BlockTable, start: int, end: int) -> Slots:
        return slots_of(block_table, start, end, self._format.block_size)

    def _read_state(self, slot: int) -> np.uint64:
        """A state that depends on every byte of one position, read from its block.

        The chain goes on from what lies in the block, not from the plan, so that a wrong byte spreads.
        """
        lanes = self._blocks[:, :, [slot]]
        return restore(self._format, lanes)

    def _frame(self, piece: Piece, buffer: memoryview) -> Lanes:
        row = self._format.head_dim * DTYPE_BYTES[self._format.dtype]
        shape = (piece.num_layers, 2, piece.num_tokens, piece.num_heads, row)
        return np.frombuffer(buffer, np.uint8).reshape(shape)


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


def chain(state: np.uint64, tokens: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """States [num_tokens] of positions that follow one whose state is `state`."""
    states = np.empty(len(tokens), np.uint64)
    value = int(state)
    for place, token in enumerate(tokens.tolist()):
        value = _mix_one(value ^ (token + 1))
        states[place] = value
    return states


def _mix_one(value: int) -> int:
    """`mix` of one word, where numpy would take ten times as long."""
    value = (value + _STEP_INT) & _WORD
    value = ((value ^ (value >> 30)) * _A_INT) & _WORD
    value = ((value ^ (value >> 27)) * _B_INT) & _WORD
    return value ^ (value >> 31)


def mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finaliser: a bijection of 64-bit words, elementwise."""
    values = values + _STEP
    values = (values ^ (values >> np.uint64(30))) * _MIX_A
    values = (values ^ (values >> np.uint64(27))) * _MIX_B
    return values ^ (values >> np.uint64(31))


def lanes_shape(kv_format: KVFormat, num_positions: int) -> tuple[int, int, int, int, int]:
    row = kv_format.head_dim * DTYPE_BYTES[kv_format.dtype]
    return (kv_format.num_layers, 2, num_positions, kv_format.num_kv_heads, row)


def expand(kv_format: KVFormat, states: npt.NDArray[np.uint64]) -> Lanes:
    """KV bytes of positions with these states.

    The first word of each (layer, kind, head) row is mix(state ^ place); a row is cut or repeated from words.
    """
    num_layers, kinds, _, num_heads, row = lanes_shape(kv_format, 0)
    num_words = -(-row // 8)
    places = np.arange(num_layers * kinds * num_heads * num_words, dtype=np.uint64)
    words = mix(states[:, None] ^ (places << np.uint64(32)))  # [positions, places]
    shaped = words.view(np.uint8).reshape(len(states), num_layers, kinds, num_heads, num_words * 8)
    return np.ascontiguousarray(shaped[..., :row].transpose(1, 2, 0, 3, 4))


def restore(kv_format: KVFormat, lanes: Lanes) -> np.uint64:
    """The state that one position's KV was expanded from; some other state if any byte of it is wrong."""
    first_word = np.ascontiguousarray(lanes[0, 0, 0, 0, :8]).view(np.uint64)
    state = unmix(first_word)
    if np.array_equal(expand(kv_format, state), lanes):
        return np.uint64(state[0])
    return np.uint64(int.from_bytes(hashlib.blake2b(lanes.tobytes(), digest_size=8).digest(), "little"))


def unmix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The inverse of `mix`."""
    values = values ^ (values >> np.uint64(31)) ^ (values >> np.uint64(62))
    values = values * _UNMIX_B
    values = values ^ (values >> np.uint64(27)) ^ (values >> np.uint64(54))
    values = values * _UNMIX_A
    values = values ^ (values >> np.uint64(30)) ^ (values >> np.uint64(60))
    return values - _STEP


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
    row = logits_row(value, token, settings.vocab_size)
    if adjusts(unpenalised):
        token = greedy(adjust(row, unpenalised))
    return token, None if wanted.num_logprobs is None else find_logprobs(row, token, wanted.num_logprobs)


def score(context: Lanes, target: int, num_top: int, settings: MemorySettings) -> Logprobs:
    """How likely a known token is after a context."""
    digest = hashlib.blake2b(np.ascontiguousarray(context).data, digest_size=8)
    digest.update((settings.numerics + settings.draws).encode())
    value = int.from_bytes(digest.digest(), "little")
    return find_logprobs(logits_row(value, value % settings.vocab_size, settings.vocab_size), target, num_top)


def logits_row(value: int, best: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """Logits [vocab] in [-4, 4) that follow from a digest's value, and 4 for `best`."""
    words = mix(np.arange(vocab_size, dtype=np.uint64) ^ np.uint64(value))
    row = (words >> np.uint64(40)).astype(np.float32) / np.float32(1 << 21) - np.float32(4)
    row[best] = 4
    return row
