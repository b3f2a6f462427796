"""From a batch of logits to tokens, by numpy: the definition of a draw, and its fallback without a compiler.

`native/sampler.py` gives the same tokens to the bit and is what a native worker runs; the reference pass
(`reference.py`) judges both.

A row goes through bans, biases, penalties, then (unless it is greedy) temperature, min_p, top_k, top_p: vLLM's
order.

Weights. `weigh` turns a row into whole numbers, trunc(2^30 x 2^((logit - max) x log2(e) / temperature)), by
single fp32 operations in a fixed order (a polynomial, not the platform's exp). Sums of whole numbers are
exact in any order and in any grouping: that is what lets every implementation find the same token by whatever
search is fastest on its machine. Rounding down moves no token's probability by more than 2^-30.

The draw. Tokens are sorted by (weight descending, id ascending). Every filter keeps a prefix of that order. The
token is the first whose cumulated weight exceeds uniform x (weight of the prefix), rounded down.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from kvferry.engine.sampling.penalties import adjust, adjusts
from kvferry.engine.sampling.philox import uniform24
from kvferry.schedule.step import Draw, Logprobs
from kvferry.wire.sampling import Sampling

Logits = npt.NDArray[np.float32]  # [vocab], or [draws, vocab] where it says so
Weights = npt.NDArray[np.uint32]  # [vocab]

# Colder than this is greedy, as in vLLM: differences of logits would overflow.
MIN_TEMPERATURE: Final = 1e-5
WEIGHT_ONE: Final = 1 << 30  # the weight of the largest logit
_LARGEST_LOGIT: Final = 1e30
_LOG2_E: Final = float.fromhex("0x1.71547652b82fep+0")
_LOWEST_EXPONENT: Final = np.float32(-33)  # weighs 0
# 2^f = 1 + f * (c0 + f * (c1 + ...)) on [-0.5, 0.5], minimax: relative error below 2e-9 before rounding.
_EXP2: Final = tuple(
    np.float32(float.fromhex(text))
    for text in (
        "0x1.62e430p-1", "0x1.ebfbdcp-3", "0x1.c6aee8p-5", "0x1.3b2d4cp-7", "0x1.5f3e54p-10", "0x1.41fbbcp-13",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Drawn:
    """Results of a batch, one per draw."""

    tokens: list[int]
    logprobs: list[Logprobs | None]


def sample(logits: Logits, draws: Sequence[Draw]) -> Drawn:
    """One token for each row of `logits` [draws, vocab], which it leaves as they are."""
    tokens = [draw(row, wanted) for row, wanted in zip(logits, draws, strict=True)]
    logprobs = [
        None if wanted.num_logprobs is None else find_logprobs(row, token, wanted.num_logprobs)
        for row, token, wanted in zip(logits, tokens, draws, strict=True)
    ]
    return Drawn(tokens, logprobs)


def draw(logits: Logits, wanted: Draw) -> int:
    """The token of one row. Temperature 0 takes the largest logit; ties go to the lower id."""
    if adjusts(wanted):
        logits = adjust(logits, wanted)
    sampling = wanted.sampling
    if is_greedy(sampling):
        return greedy(logits)
    ids, cumulated = kept(logits, sampling)
    target = int(cumulated[-1]) * uniform24(sampling.seed, wanted.choice, wanted.index) >> 24
    return int(ids[np.searchsorted(cumulated, np.uint64(target), side="right")])


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def greedy(logits: Logits) -> int:
    """The lowest id of the largest logit. NaN is below everything: a broken row still gives a token."""
    best = int(np.argmax(logits))
    if np.isnan(logits[best]):  # argmax takes NaN for the largest
        best = int(np.argmax(np.where(np.isnan(logits), -np.inf, logits)))
    return best


def kept(logits: Logits, sampling: Sampling) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Ids that pass the filters, in drawing order, and their cumulated weights."""
    ids, weights = ordered(weigh(logits, sampling.temperature), sampling)
    cumulated = np.cumsum(weights, dtype=np.uint64)
    if sampling.top_p < 1:
        # The smallest prefix that holds top_p of the mass.
        share = math.ceil(sampling.top_p * float(cumulated[-1]))
        end = int(np.searchsorted(cumulated, np.uint64(share), side="left")) + 1
        return ids[:end], cumulated[:end]
    return ids, cumulated


def weigh(logits: Logits, temperature: float) -> Weights:
    """Whole numbers, `WEIGHT_ONE` for the largest logit. A row with NaN or without a finite value stays drawable."""
    best = logits.max()
    if not np.isfinite(best):
        # A sequence whose numbers broke down must end as any other, not take the step down with it.
        logits = np.nan_to_num(logits, nan=-np.inf, posinf=_LARGEST_LOGIT, neginf=-np.inf)
        best = logits.max()
        if not np.isfinite(best):
            return np.full(logits.shape, WEIGHT_ONE, np.uint32)
    with np.errstate(over="ignore"):  # far below the best is -inf, and that weighs nothing
        y = (logits - best) * np.float32(_LOG2_E / temperature)
    np.maximum(y, _LOWEST_EXPONENT, out=y)
    whole = np.rint(y)
    y -= whole
    power = _EXP2[-1] * y
    for coefficient in _EXP2[-2::-1]:
        power += coefficient
        power *= y
    power += np.float32(1)
    weights: Weights = np.ldexp(power, whole.astype(np.int32) + 30).astype(np.uint32)
    return weights


def ordered(weights: Weights, sampling: Sampling) -> tuple[npt.NDArray[np.int64], Weights]:
    """Tokens that pass min_p and top_k, sorted by (weight descending, id ascending). None of them weighs 0."""
    ids = np.flatnonzero(weights >= max(1, math.ceil(sampling.min_p * WEIGHT_ONE)))
    if 0 < sampling.top_k < len(ids):
        candidates = weights[ids]
        ids = ids[candidates >= np.partition(candidates, -sampling.top_k)[-sampling.top_k]]
    # One 64-bit key per token (inverted weight, id) sorts by both at once, several times faster than a
    # stable argsort.
    inverted = np.uint64(0xFFFFFFFF) - weights[ids].astype(np.uint64)
    keys = np.sort((inverted << np.uint64(32)) | ids.astype(np.uint64))
    if 0 < sampling.top_k < len(keys):
        keys = keys[: sampling.top_k]
    ids = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return ids, weights[ids]


def find_logprobs(logits: Logits, token: int, num_top: int) -> Logprobs:
    """Of the raw logits: what the model said, not what the draw made of it (vLLM's `raw_logprobs`)."""
    best = np.fmax.reduce(logits)
    norm = math.nan  # a row without a finite best has no distribution
    if np.isfinite(best):
        weights = weigh(np.nan_to_num(logits, nan=-np.inf, neginf=-np.inf), 1.0)
        norm = math.log(int(weights.sum(dtype=np.uint64)) / WEIGHT_ONE) + float(best)
    top = _best(logits, num_top)
    return Logprobs(
        logprob=_logprob(logits[token], norm),
        rank=max(1, int(np.count_nonzero(logits >= logits[token]))),  # a NaN is not at least itself
        top_tokens=tuple(top.tolist()),
        top_logprobs=tuple(_logprob(-np.inf if np.isnan(logits[token]) else logits[token], norm) for token in top),
    )


def _best(logits: Logits, count: int) -> npt.NDArray[np.int64]:
    """The `count` best tokens by (logit descending, id ascending)."""
    if not count:
        return np.empty(0, np.int64)
    rising = np.where(np.isnan(logits), np.inf, -logits)
    candidates = np.flatnonzero(rising <= np.partition(rising, count - 1)[count - 1])
    return candidates[np.argsort(rising[candidates], kind="stable")][:count]


def _logprob(logit: float, norm: float) -> float:
    with np.errstate(over="ignore"):  # beyond fp32 it is minus infinity
        return float(np.float32(float(logit) - norm))
