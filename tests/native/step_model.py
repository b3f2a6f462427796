"""A model of random weights in the native library, and the same model in NumPy's fp64.

The reference rounds where Hugging Face rounds (see engine/torch/model.py) and is exact in between, so what is left
between the two is the order of fp32 sums, the rounding of probabilities, and what a flipped bf16 bit does further on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from kvferry.engine.native.library import SEQUENCE, Cache, Library, Piece, Shape, Wanted, Weight

Floats = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint16]
Tokens = npt.NDArray[np.uint32]


def to_bf16(values: npt.ArrayLike) -> Words:
    """Round to nearest, ties to even."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(words: Words) -> Floats:
    return (words.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def rounded(values: npt.ArrayLike) -> Floats:
    return from_bf16(to_bf16(values))


@dataclass(frozen=True)
class Config:
    """A shape of the engine, with sizes that a test can afford."""

    num_layers: int = 2
    hidden_size: int = 48
    intermediate_size: int = 64
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 16
    vocab_size: int = 101
    max_len: int = 256
    block_size: int = 16
    quantization: int = 0
    tied: int = 1
    qkv_bias: int = 0
    output_bias: int = 0
    mlp_bias: int = 0
    qk_norm: int = 0
    rms_norm_eps: float = 1e-5
    windows: tuple[int, ...] = ()  # () for none
    theta: float = 10000.0

    @property
    def queries(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    def shape(self, threads: int) -> Shape:
        own = ("windows", "theta")
        values = {name: value for name, value in self.__dict__.items() if name not in own}
        return Shape(threads=threads, **values)

    def window(self, layer: int) -> int:
        return self.windows[layer] if self.windows else 0


def rope_tables(config: Config) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """cos and sin [max_len, head_dim / 2], rounded to bf16."""
    frequencies = config.theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = np.arange(config.max_len)[:, None] * frequencies
    return rounded(np.cos(angles)).astype(np.float32), rounded(np.sin(angles)).astype(np.float32)


def random_weights(config: Config, seed: int) -> dict[tuple[Weight, int], Words]:
    """By (weight, layer): [n, k] bf16, k = 1 for norms and biases."""
    draw = np.random.default_rng(seed)

    def matrix(n: int, k: int, scale: float | None = None) -> Words:
        return to_bf16(draw.standard_normal((n, k), np.float32) * (k**-0.5 if scale is None else scale))

    def norm(n: int) -> Words:
        return to_bf16(draw.uniform(0.5, 1.5, (n, 1)))

    weights = {
        (Weight.EMBEDDING, 0): matrix(config.vocab_size, config.hidden_size, 1.0 / config.hidden_size**0.25),
        (Weight.NORM, 0): norm(config.hidden_size),
    }
    if not config.tied:
        weights[Weight.HEAD, 0] = matrix(config.vocab_size, config.hidden_size)
    for layer in range(config.num_layers):
        weights |= {
            (Weight.INPUT_NORM, layer): norm(config.hidden_size),
            (Weight.POST_NORM, layer): norm(config.hidden_size),
            (Weight.QKV, layer): matrix(config.qkv, config.hidden_size, 1.5 * config.hidden_size**-0.5),
            (Weight.OUTPUT, layer): matrix(config.hidden_size, config.queries),
            (Weight.GATE, layer): matrix(config.intermediate_size, config.hidden_size),
            (Weight.UP, layer): matrix(config.intermediate_size, config.hidden_size),
            (Weight.DOWN, layer): matrix(config.hidden_size, config.intermediate_size),
        }
        if config.qkv_bias:
            weights[Weight.QKV_BIAS, layer] = matrix(config.qkv, 1, 0.5)
        if config.output_bias:
            weights[Weight.OUTPUT_BIAS, layer] = matrix(config.hidden_size, 1, 0.5)
        if config.mlp_bias:
            weights[Weight.GATE_BIAS, layer] = matrix(config.intermediate_size, 1, 0.5)
            weights[Weight.UP_BIAS, layer] = matrix(config.intermediate_size, 1, 0.5)
            weights[Weight.DOWN_BIAS, layer] = matrix(config.hidden_size, 1, 0.5)
        if config.qk_norm:
            weights[Weight.Q_NORM, layer] = norm(config.head_dim)
            weights[Weight.K_NORM, layer] = norm(config.head_dim)
    return weights


MATRICES = (Weight.QKV, Weight.OUTPUT, Weight.GATE, Weight.UP, Weight.DOWN, Weight.HEAD)
GROUP = 64  # int8: this many k share a scale


def quantised(matrix: Floats, *, is_weight: bool) -> Floats:
    """Rows [n, k] as int8 codes of groups stand for them: a weight's scale is the next bf16 above, a row's is exact."""
    n, k = matrix.shape
    groups = np.pad(matrix, ((0, 0), (0, -k % GROUP))).reshape(n, -1, GROUP)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    if is_weight:
        up = (scale.astype(np.float32).view(np.uint32) + 0xFFFF) >> 16
        scale = from_bf16(up.astype(np.uint16))
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    return (codes * scale).reshape(n, -1)[:, :k]


class Reference:
    """The whole model in fp64, without a cache: logits [len(tokens), vocab] of one sequence.

    int8: weights and the rows that meet them are quantised as the library does it, and products are exact again.
    """

    def __init__(self, config: Config, weights: dict[tuple[Weight, int], Words]) -> None:
        self._config = config
        self._weights = {key: from_bf16(words) for key, words in weights.items()}
        if config.quantization:
            matrices = (*MATRICES, *((Weight.EMBEDDING,) if config.tied else ()))
            for key, matrix in self._weights.items():
                if key[0] in matrices:
                    self._weights[key] = quantised(matrix, is_weight=True)
        self._cos, self._sin = (table.astype(np.float64) for table in rope_tables(config))

    def logits(self, tokens: Tokens, last: int | None = None) -> Floats:
        """Of all rows, or of the `last` ones: then attention's matrix stays small at any length."""
        config, weights = self._config, self._weights
        hidden = rounded(weights[Weight.EMBEDDING, 0][tokens])
        for layer in range(config.num_layers):
            normed = self._norm(hidden, Weight.INPUT_NORM, layer)
            heads = self._linear(normed, Weight.QKV, Weight.QKV_BIAS, layer)
            wanted = last if last is not None and layer + 1 == config.num_layers else len(tokens)
            mixed = self._attend(heads.reshape(len(tokens), -1, config.head_dim), layer, wanted)
            hidden = rounded(hidden[-wanted:] + self._linear(mixed, Weight.OUTPUT, Weight.OUTPUT_BIAS, layer))
            normed = self._norm(hidden, Weight.POST_NORM, layer)
            gate = self._linear(normed, Weight.GATE, Weight.GATE_BIAS, layer)
            up = self._linear(normed, Weight.UP, Weight.UP_BIAS, layer)
            activated = rounded(rounded(gate / (1 + np.exp(-gate))) * up)
            hidden = rounded(hidden + self._linear(activated, Weight.DOWN, Weight.DOWN_BIAS, layer))
        head = weights[Weight.EMBEDDING if config.tied else Weight.HEAD, 0]
        return rounded(self._product(self._norm(hidden, Weight.NORM, 0), head))

    def _norm(self, x: Floats, weight: Weight, layer: int) -> Floats:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + self._config.rms_norm_eps)
        return rounded(rounded(x * scale) * self._weights[weight, layer][:, 0])

    def _linear(self, x: Floats, weight: Weight, bias: Weight, layer: int) -> Floats:
        y = self._product(x, self._weights[weight, layer])
        if (bias, layer) in self._weights:
            y = y + self._weights[bias, layer][:, 0]
        return rounded(y)

    def _product(self, x: Floats, matrix: Floats) -> Floats:
        return (quantised(x, is_weight=False) if self._config.quantization else x) @ matrix.T

    def _attend(self, heads: Floats, layer: int, wanted: int) -> Floats:
        config = self._config
        num_rows, num_queries = len(heads), config.num_heads
        rotated, values = np.split(heads, [num_queries + config.num_kv_heads], axis=1)
        queries, keys = np.split(rotated, [num_queries], axis=1)
        if config.qk_norm:
            queries = self._norm(queries, Weight.Q_NORM, layer)
            keys = self._norm(keys, Weight.K_NORM, layer)
        queries, keys = self._rotate(queries), self._rotate(keys)
        queries = queries[-wanted:]
        group = num_queries // config.num_kv_heads
        scores = np.einsum("qhd,khd->hqk", queries, np.repeat(keys, group, 1)) * config.head_dim**-0.5
        distance = np.arange(num_rows)[-wanted:, None] - np.arange(num_rows)
        hidden = distance < 0
        if window := config.window(layer):
            hidden |= distance >= window
        scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        return rounded(np.einsum("hqk,khd->qhd", weights, np.repeat(values, group, 1))).reshape(wanted, -1)

    def _rotate(self, heads: Floats) -> Floats:
        low, high = np.split(heads, 2, axis=-1)
        cos, sin = self._cos[: len(heads), None], self._sin[: len(heads), None]
        turned = np.concatenate((-high, low), -1)
        both = (np.concatenate((table, table), -1) for table in (cos, sin))
        return rounded(rounded(heads * next(both)) + rounded(turned * next(both)))


@dataclass
class Rows:
    """One sequence of a step."""

    tokens: Tokens
    start: int
    table: npt.NDArray[np.int32]
    wanted: Wanted = Wanted.ALL


@dataclass
class NativeModel:
    """A model in the library, with a cache full of NaN. Close it."""

    library: Library
    config: Config
    weights: dict[tuple[Weight, int], Words]
    threads: int = 1
    num_blocks: int = 64
    poison: int = 0xFFFF  # a NaN in every half-word
    cache: npt.NDArray[np.uint8] = field(init=False)
    blocks: Cache = field(init=False)  # the cache, as copies take it
    handle: ctypes.c_void_p = field(init=False)

    def __post_init__(self) -> None:
        library, config = self.library, self.config
        shape = config.shape(self.threads)
        windows = np.asarray(config.windows or (0,) * config.num_layers, np.int32)
        cos, sin = rope_tables(config)
        error = ctypes.c_int32()
        handle = library.c.kvf_model_create(
            ctypes.byref(shape), windows.ctypes.data, cos.ctypes.data, sin.ctypes.data, ctypes.byref(error)
        )
        assert handle, library.failure(error.value)
        self.handle = ctypes.c_void_p(handle)
        for (weight, layer), words in self.weights.items():
            whole = np.ascontiguousarray(words)
            call = library.c.kvf_model_load
            library.call(call, self.handle, weight, layer, whole.ctypes.data, *whole.shape, 0)
        library.call(library.c.kvf_model_finish, self.handle)
        size = library.c.kvf_cache_bytes(ctypes.byref(shape), self.num_blocks)
        room = np.full(size + 64, 0xFF if self.poison else 0, np.uint8)
        self.cache = room[-room.ctypes.data % 64 :][:size]
        library.call(library.c.kvf_model_set_cache, self.handle, self.cache.ctypes.data, self.num_blocks)
        self.blocks = Cache(ctypes.pointer(shape), self.cache.ctypes.data, self.num_blocks)

    def close(self) -> None:
        self.library.c.kvf_model_free(self.handle)

    def __enter__(self) -> NativeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def step(self, *sequences: Rows) -> list[npt.NDArray[np.float32]]:
        """Wanted logits of each sequence, [rows, vocab]."""
        counts = [{Wanted.NONE: 0, Wanted.LAST: 1, Wanted.ALL: len(rows.tokens)}[rows.wanted] for rows in sequences]
        logits = np.full((sum(counts), self.config.vocab_size), np.nan, np.float32)
        self.library.call(self.library.c.kvf_step, self.handle, *self.columns(sequences), logits.ctypes.data)
        return np.split(logits, np.cumsum(counts)[:-1])

    def columns(self, sequences: Sequence[Rows]) -> tuple[int, int]:
        """Pointer to kvf_sequence[] and its length; lives as long as the model."""
        self._kept = np.zeros(len(sequences), SEQUENCE)
        for record, rows in zip(self._kept, sequences, strict=True):
            record["tokens"], record["block_table"] = rows.tokens.ctypes.data, rows.table.ctypes.data
            record["num_rows"], record["start"] = len(rows.tokens), rows.start
            record["num_blocks"], record["logits"] = len(rows.table), rows.wanted
        return self._kept.ctypes.data, len(sequences)

    def frame(self, table: npt.NDArray[np.int32], start: int, end: int, **ranges: int) -> Words:
        """Gathered KV [layers, 2, tokens, heads, head_dim]."""
        config = self.config
        piece = whole_piece(config, start, end, **ranges)
        frame = np.full(piece_shape(config, piece), 0x7F7F, np.uint16)
        self.transfer("kvf_gather", piece, table, frame)
        return frame

    def transfer(self, name: str, piece: Piece, table: npt.NDArray[np.int32], frame: npt.NDArray[Any]) -> None:
        function = getattr(self.library.c, name)
        arguments = (table.ctypes.data, len(table), frame.ctypes.data, frame.nbytes)
        self.library.call(function, ctypes.byref(self.blocks), ctypes.byref(piece), 1, *arguments)


def placed_words(shape: tuple[int, ...], offset: int) -> tuple[Words, Words]:
    """(an array that begins `offset` bytes behind a whole cache line, the memory before and behind it too)."""
    count = int(np.prod(shape))
    room = np.full(count + 96, 0x5A5A, np.uint16)
    first = (-room.ctypes.data % 64 + offset) // 2
    return room[first : first + count].reshape(shape), room


def whole_piece(config: Config, start: int, end: int, **ranges: int) -> Piece:
    names = {"layer_start": 0, "layer_end": config.num_layers, "head_start": 0, "head_end": config.num_kv_heads}
    return Piece(token_start=start, token_end=end, **(names | ranges))


def piece_shape(config: Config, piece: Piece) -> tuple[int, ...]:
    return (
        piece.layer_end - piece.layer_start, 2, piece.token_end - piece.token_start,
        piece.head_end - piece.head_start, config.head_dim,
    )  # fmt: skip
