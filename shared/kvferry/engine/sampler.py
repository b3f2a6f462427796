"""From logits to one token. Shared by every runner and by the reference pass, so that draws can be repeated.

Filters run in vLLM's order: temperature, min_p, top_k, top_p. Each keeps a prefix of the tokens sorted by
(p descending, id ascending), so the kept set is a prefix too. The draw is an inverse CDF in fp32, summed in
that order: the first token whose cumulated weight exceeds uniform x total. Weights are
exp((logit - max) / temperature); they are not normalised, because the comparison does not need it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from kvferry.engine.philox import uniform
from kvferry.wire.messages import Sampling

Logits = npt.NDArray[np.float32]  # [vocab]
# Colder than this is greedy, as in vLLM: differences of logits would overflow.
MIN_TEMPERATURE: Final = 1e-5
_LARGEST_LOGIT: Final = 1e30
NEGLIGIBLE: Final = np.float32(2.0**-24)  # half a unit in the last place of 1, in fp32


def draw(logits: Logits, sampling: Sampling, choice: int, index: int) -> int:
    """The token id. Temperature 0 takes the largest logit, ties go to the lower id."""
    if is_greedy(sampling):
        return int(np.argmax(logits))
    ids, cumulated = kept(logits, sampling)
    target = np.float32(uniform(sampling.seed, choice, index)) * cumulated[-1]
    # Rounding may lift the target to the total itself: the last kept token takes that.
    place = min(int(np.searchsorted(cumulated, target, side="right")), len(ids) - 1)
    return int(ids[place])


def is_greedy(sampling: Sampling) -> bool:
    return sampling.temperature < MIN_TEMPERATURE


def kept(logits: Logits, sampling: Sampling) -> tuple[npt.NDArray[np.int64], Logits]:
    """Ids that pass the filters, in drawing order, and their cumulated weights (fp32)."""
    ids, weights = ordered(weigh(logits, sampling.temperature), sampling)
    cumulated = np.cumsum(weights, dtype=np.float32)
    if sampling.top_p < 1:
        # The smallest prefix that holds top_p of the mass.
        share = np.float32(sampling.top_p) * cumulated[-1]
        end = min(int(np.searchsorted(cumulated, share, side="left")) + 1, len(ids))
        return ids[:end], cumulated[:end]
    return ids, cumulated


def weigh(logits: Logits, temperature: float) -> Logits:
    """exp((logit - max) / temperature), fp32. A row with NaN or without a finite value stays drawable."""
    best = logits.max()
    if not np.isfinite(best):
        # A sequence whose numbers broke down must end as any other, not take the step down with it.
        logits = np.nan_to_num(logits, nan=-np.inf, posinf=_LARGEST_LOGIT, neginf=-np.inf)
        best = logits.max()
        if not np.isfinite(best):
            return np.ones_like(logits)
    weights: Logits = np.exp((logits - best) / np.float32(temperature))
    return weights


def ordered(weights: Logits, sampling: Sampling) -> tuple[npt.NDArray[np.int64], Logits]:
    """Tokens that pass min_p and top_k, sorted by (weight descending, id ascending).

    The largest weight is 1, so the running fp32 sum is never below 1 and a weight under half its unit in the
    last place leaves it as it is: such tokens can't be drawn, and leaving them out changes no bit. With a
    real model that spares sorting nearly the whole vocabulary.
    """
    ids = np.flatnonzero(weights >= max(np.float32(sampling.min_p), NEGLIGIBLE))
    if 0 < sampling.top_k < len(ids):
        candidates = weights[ids]
        ids = ids[candidates >= np.partition(candidates, -sampling.top_k)[-sampling.top_k]]
    # One 64-bit key per token (inverted weight bits, id) sorts by both at once, several times faster than
    # a stable argsort; the bits of non-negative floats rise with their value.
    inverted = np.uint64(0xFFFFFFFF) - weights[ids].view(np.uint32).astype(np.uint64)
    keys = np.sort((inverted << np.uint64(32)) | ids.astype(np.uint64))
    if 0 < sampling.top_k < len(keys):
        keys = keys[: sampling.top_k]
    ids = (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return ids, weights[ids]
