"""KV of the in-memory twin (`runner.py`): states of positions, and the bytes that follow from them. Pure."""

from __future__ import annotations

import hashlib
import math
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvferry.schedule.step import KVFormat
from kvferry.wire.frame import DTYPE_BYTES

Lanes: TypeAlias = npt.NDArray[np.uint8]  # [layers, 2, positions, kv_heads, head_dim * itemsize]: raw bytes

_MIX_A = np.uint64(0xBF58476D1CE4E5B9)  # constants of splitmix64
_MIX_B = np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_UNMIX_A = np.uint64(pow(int(_MIX_A), -1, 1 << 64))
_UNMIX_B = np.uint64(pow(int(_MIX_B), -1, 1 << 64))
_A_INT, _B_INT, _STEP_INT, _WORD = int(_MIX_A), int(_MIX_B), int(_STEP), (1 << 64) - 1


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


def expand(kv_format: KVFormat, states: npt.NDArray[np.uint64], heads: range | None = None) -> Lanes:
    """KV bytes of positions with these states: of all heads, or some.

    The first word of each (layer, kind, head) row is mix(state ^ place); a row is cut or repeated from words.
    Not to be written.
    """
    heads = range(kv_format.num_kv_heads) if heads is None else heads
    return _expand_one(kv_format, int(states[0]), heads) if len(states) == 1 else _expand(kv_format, states, heads)


@lru_cache(1 << 12)  # a step of decoding: other ranks, other workers and the check of the answer ask for the same
def _expand_one(kv_format: KVFormat, state: int, heads: range) -> Lanes:
    lanes = _expand(kv_format, np.array([state], np.uint64), heads)
    lanes.flags.writeable = False
    return lanes


def _expand(kv_format: KVFormat, states: npt.NDArray[np.uint64], heads: range) -> Lanes:
    num_layers, kinds, _, _, row = lanes_shape(kv_format, 0)
    num_words = -(-row // 8)
    words = mix(states[:, None] ^ _places(kv_format, heads))  # [positions, places]
    shaped = words.view(np.uint8).reshape(len(states), num_layers, kinds, len(heads), num_words * 8)
    return np.ascontiguousarray(shaped[..., :row].transpose(1, 2, 0, 3, 4))


def restore(kv_format: KVFormat, lanes: Lanes, heads: range) -> np.uint64:
    """The state that one position's KV of some heads was expanded from; some other state if any byte of it is wrong."""
    first_word = np.ascontiguousarray(lanes[0, 0, 0, 0, :8]).view(np.uint64)
    state = unmix(first_word) ^ _places(kv_format, heads)[:1]
    if np.array_equal(expand(kv_format, state, heads), lanes):
        return np.uint64(state[0])
    return np.uint64(int.from_bytes(hashlib.blake2b(lanes.tobytes(), digest_size=8).digest(), "little"))


@lru_cache
def _places(kv_format: KVFormat, heads: range) -> npt.NDArray[np.uint64]:
    """What sets the words of (layer, kind, head, word) apart, flat; not to be written."""
    num_layers, kinds, _, num_heads, row = lanes_shape(kv_format, 0)
    shape = (num_layers * kinds, num_heads, -(-row // 8))
    places = np.arange(math.prod(shape), dtype=np.uint64).reshape(shape)
    flat = np.ravel(places[:, heads.start : heads.stop]) << np.uint64(32)
    flat.flags.writeable = False
    return flat


def unmix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The inverse of `mix`."""
    values = values ^ (values >> np.uint64(31)) ^ (values >> np.uint64(62))
    values = values * _UNMIX_B
    values = values ^ (values >> np.uint64(27)) ^ (values >> np.uint64(54))
    values = values * _UNMIX_A
    values = values ^ (values >> np.uint64(30)) ^ (values >> np.uint64(60))
    return values - _STEP
