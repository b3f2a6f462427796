"""The sampler of the native library: a batch of draws is one call. Same tokens as `sampling/sampler.py`, to the bit."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt

from kvferry.engine.sampling.sampler import Drawn
from kvferry.schedule.step import MAX_LOGPROBS, Draw, Logprobs
from kvferry.wire.fields import TokenArray
from kvferry.wire.logprobs import PromptLogprobs

_ALIGNMENT: Final = 64
MIN_ROOM: Final = 64  # draws
_MAX_TOP_K: Final = (1 << 31) - 1  # beyond every vocabulary
# `kvf_draw` of sample.h, whose fields lie without gaps.
_DRAW: Final = struct.Struct("<ddd Q II i fff Q ii QQ ii Q ii Q")
_BIAS: Final = np.dtype([("token", "<u4"), ("bias", "<f4")])
_LOGPROBS: Final = np.dtype(
    [
        ("logprob", "<f4"), ("rank", "<i4"),
        ("top_tokens", "<u4", MAX_LOGPROBS), ("top_logprobs", "<f4", MAX_LOGPROBS),
    ]
)  # fmt: skip


class NativeSampler:
    """Draws from rows of one vocabulary size: one call at a time."""

    def __init__(self, library: ctypes.CDLL, vocab_size: int, model: int | None = None) -> None:
        """With a `kvf_model` its threads share the rows, and its steps and these draws take turns.

        Raises RuntimeError for a vocabulary that the library does not take.
        """
        library.kvf_sample_scratch_bytes.argtypes = [ctypes.c_int32]
        library.kvf_sample_scratch_bytes.restype = ctypes.c_uint64
        library.kvf_sample.argtypes = [
            ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p,
        ]  # fmt: skip
        library.kvf_sample.restype = ctypes.c_int32
        num_bytes = library.kvf_sample_scratch_bytes(vocab_size)
        if not num_bytes:
            raise RuntimeError(f"a vocabulary of {vocab_size} tokens is out of bounds")
        self._vocab_size = vocab_size
        self._make_room(MIN_ROOM)
        self._score: Callable[[int, int, int, int, int], int]  # logits, rows, targets, num_top, records -> error
        self._call: Callable[[int, int, int, int], int]  # logits, number of draws, draws, tokens -> error
        if model is None:
            self._scratch = np.empty(num_bytes + _ALIGNMENT, np.uint8)
            where = -(-_address(self._scratch) // _ALIGNMENT) * _ALIGNMENT
            self._call = lambda logits, count, draws, tokens: library.kvf_sample(
                logits, count, vocab_size, draws, where, tokens
            )
        else:
            library.kvf_model_sample.argtypes = [
                ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p,
            ]  # fmt: skip
            library.kvf_model_sample.restype = ctypes.c_int32
            library.kvf_model_score.argtypes = [
                ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p,
            ]  # fmt: skip
            library.kvf_model_score.restype = ctypes.c_int32
            self._call = partial(library.kvf_model_sample, model)
            self._score = partial(library.kvf_model_score, model)

    def sample(self, logits: npt.NDArray[np.float32], draws: Sequence[Draw]) -> Drawn:
        """One token for each row of `logits` [draws, vocab], contiguous, left as they are.

        Raises RuntimeError for logits of another shape and for fields out of bounds (a token of a history,
        bias or ban outside the vocabulary, more than `MAX_LOGPROBS`).
        """
        shape = (len(draws), self._vocab_size)
        if logits.shape != shape or logits.dtype != np.float32 or not logits.flags.c_contiguous:
            raise RuntimeError(f"logits of shape {logits.shape} and type {logits.dtype}, not fp32 {shape} in C order")
        if len(draws) > len(self._tokens):
            self._make_room(len(draws))
        wanted = [row for row, draw in enumerate(draws) if draw.num_logprobs is not None]
        logprobs = np.empty(len(wanted), _LOGPROBS)
        out = dict(zip(wanted, range(_address(logprobs), 1 << 64, _LOGPROBS.itemsize), strict=False))
        alive: list[npt.NDArray[np.generic]] = []  # what the fields point at
        for row, draw in enumerate(draws):
            _pack(self._fields, row, draw, self._vocab_size, out.get(row, 0), alive)
        if error := self._call(_address(logits), len(draws), self._fields_at, self._tokens_at):
            raise RuntimeError(f"kvf_sample: error {error}")
        found: list[Logprobs | None] = [None] * len(draws)
        for row, record in zip(wanted, logprobs, strict=True):
            found[row] = _unpack(record, draws[row].num_logprobs or 0)
        return Drawn(self._tokens[: len(draws)].tolist(), found)

    def _make_room(self, count: int) -> None:
        """For so many draws, and all calls to come: a step waits for what is made here."""
        self._fields = bytearray(count * _DRAW.size)  # never of another size, so that it stays where it is
        self._tokens = np.empty(count, np.uint32)
        self._fields_at, self._tokens_at = _address(np.frombuffer(self._fields, np.uint8)), _address(self._tokens)

    def score(self, logits: npt.NDArray[np.float32], targets: TokenArray, num_top: int, start: int) -> PromptLogprobs:
        """Of known tokens [num_rows], at positions from `start` on, by `logits` [num_rows, vocab]. Needs a model.

        Raises RuntimeError for a token outside the vocabulary and more than `MAX_LOGPROBS`.
        """
        targets = np.ascontiguousarray(targets, np.uint32)
        records = np.empty(len(targets), _LOGPROBS)
        if error := self._score(_address(logits), len(targets), _address(targets), num_top, _address(records)):
            raise RuntimeError(f"kvf_model_score: error {error}")
        return PromptLogprobs(
            start,
            records["rank"].astype(np.uint32),
            np.ascontiguousarray(records["top_tokens"][:, :num_top]),
            np.column_stack((records["logprob"], records["top_logprobs"][:, :num_top])),
        )


def _pack(
    fields: bytearray, row: int, draw: Draw, vocab_size: int, logprobs: int, alive: list[npt.NDArray[np.generic]]
) -> None:
    """Write the `kvf_draw` of a row. Arrays that it points at are added to `alive`."""
    sampling = draw.sampling
    tokens = biases = banned = num_banned = allowed = 0
    if sampling.penalised:
        history = np.ascontiguousarray(draw.tokens, np.uint32)
        alive.append(history)
        tokens = _address(history)
    if draw.logit_bias:
        pairs = np.array(list(draw.logit_bias), _BIAS)
        alive.append(pairs)
        biases = _address(pairs)
    if (words := draw.allowed()) is not None:  # bans are among what it leaves out
        if words.shape != (-(-vocab_size // 32),) or words.dtype != np.uint32 or not words.flags.c_contiguous:
            raise RuntimeError(f"a mask of shape {words.shape} and type {words.dtype} for {vocab_size} tokens")
        alive.append(words)
        allowed = _address(words)
    elif draw.banned:
        ids = np.array(draw.banned, np.uint32)
        alive.append(ids)
        banned, num_banned = _address(ids), len(ids)
    _DRAW.pack_into(
        fields, row * _DRAW.size,
        sampling.temperature, sampling.top_p, sampling.min_p, sampling.seed, draw.choice, draw.index,
        min(sampling.top_k, _MAX_TOP_K), sampling.presence_penalty, sampling.frequency_penalty,
        sampling.repetition_penalty, tokens, len(draw.tokens), draw.num_prompt, biases, banned,
        len(draw.logit_bias), num_banned, logprobs, draw.num_logprobs or 0, 0, allowed,
    )  # fmt: skip


def _unpack(record: np.void, num_top: int) -> Logprobs:
    return Logprobs(
        float(record["logprob"]), int(record["rank"]),
        tuple(record["top_tokens"][:num_top].tolist()), tuple(record["top_logprobs"][:num_top].tolist()),
    )  # fmt: skip


def _address(array: npt.NDArray[np.generic]) -> int:
    address: int = array.__array_interface__["data"][0]
    return address
