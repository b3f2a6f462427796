"""The reference pass of the level `fast`: is every token of a finished text one that the model could draw?

One teacher-forced pass over prompt and generated tokens gives the logits before every generated token. A
token's gap is the smallest ε such that the draw can give it when logits move by so little that no difference
of two of them changes by more than ε (each moves by at most ε / 2). The text passes if every gap is at most
`EPSILON`.

Greedy: the gap is (largest logit - the token's logit).

Seeded: with the same uniform u, the token t is drawn when (mass before t) <= u x total < (mass before and
of t), tokens in the sampler's order, within what the filters keep. `accepts` bounds both sides over all such
moves. Let l be logits and T the temperature.

- Surely before t: l > l(t) + ε. Possibly before: l >= l(t) - ε. Between the two the order is open.
- Every weight exp(l / T) changes by a factor within exp(±ε / 2T).
- All filters keep a prefix of the order, so what stands before a kept token is kept. Which tokens behind it
  are kept is bounded by the shortest and the longest prefix that min_p, top_k and top_p can leave.
- The mass before t is smallest when only the sure ones stand before it, shrunk, and everything else that may
  be kept grows; the mass up to t is largest the other way round. Accepted if u lies between those two.

Masks, bans, biases and penalties come first, and what is said above holds for the logits that they leave. A repetition
penalty r stretches differences by at most s = max(r, 1 / r), so a move of ε becomes one of at most s x ε.

The bounds may be wider than what one single move reaches, never narrower: a right worker is never accused.
They are tight enough that, with the filters off, a token further than ε from what u points at is refused
unless its neighbours in the CDF close in by less than ε.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from kvferry.engine.sampling.penalties import adjust, adjusts
from kvferry.engine.sampling.philox import uniform
from kvferry.engine.sampling.sampler import Logits, is_greedy
from kvferry.schedule.step import Draw, KVFormat, SequenceStep, StepPlan, TokenMask
from kvferry.wire.sampling import Sampling

EPSILON: Final = 0.5  # logit
MAX_GAP: Final = 64.0  # larger gaps are reported as infinite
CHUNK: Final = 256  # rows of a teacher-forced step: bounds the memory of their logits
_BISECTIONS: Final = 20


@dataclass(frozen=True, slots=True)
class Verdict:
    gaps: tuple[float, ...]  # logit, one per generated token

    @property
    def largest_gap(self) -> float:
        return max(self.gaps, default=0.0)

    @property
    def accepted(self) -> bool:
        return self.largest_gap <= EPSILON


class TeacherForced(Protocol):
    """What the pass needs of a runner: the torch and the native one have it."""

    @property
    def kv_format(self) -> KVFormat: ...

    def logits(self, plan: StepPlan) -> Sequence[Logits]:
        """All rows' logits, [num_rows, vocab] for each SequenceStep, by the same pass as `execute`."""


class ReferencePass:
    """Judges texts with a runner of its own (whose cache it uses from block 0 on)."""

    def __init__(self, runner: TeacherForced, eos_token_ids: frozenset[int] = frozenset()) -> None:
        """`eos_token_ids` count only for requests with `min_tokens`."""
        self._runner = runner
        self._eos_token_ids = eos_token_ids

    def check(
        self,
        prompt: Sequence[int],
        generated: Sequence[int],
        sampling: Sampling,
        choice: int,
        mask: TokenMask | None = None,
    ) -> Verdict:
        """`generated` is the whole text of the choice, from generated index 0; `mask` a fresh one of its grammar.

        Raises RuntimeError if the text does not fit the runner's cache.
        """
        tokens = np.asarray([*prompt, *generated], np.uint32)[:-1]  # the last one is only drawn
        block_size = self._runner.kv_format.block_size
        table = np.arange(-(-len(tokens) // block_size), dtype=np.int32)
        first = len(prompt) - 1  # the row before generated index 0
        gaps: list[float] = []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            plan = StepPlan((SequenceStep(0, chunk, start, table),))
            for row, logits in enumerate(self._runner.logits(plan)[0][max(first - start, 0) :]):
                index = max(start, first) + row - first
                draw = Draw.of(
                    sampling, choice, index, tokens[: len(prompt) + index], len(prompt), self._eos_token_ids, mask
                )
                if mask is not None:
                    mask.advance(draw.tokens[draw.num_prompt :])
                gaps.append(penalised_gap(logits, generated[index], draw))
        return Verdict(tuple(gaps))


def penalised_gap(logits: Logits, token: int, draw: Draw) -> float:
    """`gap` of the raw logits, by a draw's mask and penalties too: infinite for a token that may not be drawn."""
    if not adjusts(draw):
        return gap(logits, token, draw.sampling, draw.choice, draw.index)
    stretch = max(draw.sampling.repetition_penalty, 1 / draw.sampling.repetition_penalty)
    return gap(adjust(logits, draw), token, draw.sampling, draw.choice, draw.index) / stretch


def gap(logits: Logits, token: int, sampling: Sampling, choice: int, index: int) -> float:
    """The smallest ε (to 1e-5 of it) that lets the draw give `token`; infinite above `MAX_GAP`."""
    if is_greedy(sampling):
        return float(logits.max() - logits[token])
    drawn = _Draw(logits, token, sampling, uniform(sampling.seed, choice, index))
    if drawn.accepts(0.0):
        return 0.0
    low, high = 0.0, EPSILON if drawn.accepts(EPSILON) else MAX_GAP
    if not drawn.accepts(high):
        return math.inf
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if drawn.accepts(middle) else (middle, high)
    return high


class _Draw:
    """One seeded draw, judged in fp64 over logits / temperature, sorted falling.

    `before(x)` and such count tokens, so that a count is also an index into the cumulated mass.
    """

    def __init__(self, logits: Logits, token: int, sampling: Sampling, u: float) -> None:
        scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
        self._own = float(scaled[token])
        self._rising = np.sort(scaled)
        falling: npt.NDArray[np.float64] = self._rising[::-1]
        self._falling = falling
        self._mass = np.concatenate(([0.0], np.cumsum(np.exp(falling))))  # of the n largest
        self._sampling = sampling
        self._u = u

    def accepts(self, epsilon: float) -> bool:
        """Whether the token can be drawn when no difference of two logits changes by more than `epsilon`."""
        margin = epsilon / self._sampling.temperature
        # The sampler rounds each weight down to a multiple of 2**-30, computes it in fp32, and u is a multiple of
        # 2**-24.
        slack = 1e-5 + len(self._falling) * 2.0**-30
        grow, shrink = math.exp(margin / 2), math.exp(-margin / 2)
        surely, possibly = self._above(self._own + margin), self._at_least(self._own - margin)
        shortest, longest = self._kept(margin)
        if surely >= longest:
            return False
        before = self._mass[surely] * shrink
        around = (self._mass[longest] - self._mass[surely]) * grow
        upto = self._mass[possibly] * grow
        behind = max(self._mass[shortest] - self._mass[possibly], 0.0) * shrink
        lowest, highest = before / (before + around), upto / (upto + behind)
        return bool(lowest - slack <= self._u < highest + slack)

    def _above(self, value: float) -> int:
        """How many tokens lie above a value."""
        return len(self._rising) - int(np.searchsorted(self._rising, value, side="right"))

    def _at_least(self, value: float) -> int:
        return len(self._rising) - int(np.searchsorted(self._rising, value, side="left"))

    def _kept(self, margin: float) -> tuple[int, int]:
        """Lengths of the shortest and the longest prefix that the filters can leave."""
        shortest = longest = len(self._falling)
        sampling = self._sampling
        if sampling.min_p > 0:
            floor = math.log(sampling.min_p)
            shortest = min(shortest, self._at_least(floor + margin))
            longest = min(longest, self._at_least(floor - margin))
        if 0 < sampling.top_k < len(self._falling):
            # Out of reach: as many as k others are larger by more than the margin. Safe: fewer than k
            # others can overtake.
            shortest = min(shortest, self._above(float(self._falling[sampling.top_k]) + margin))
            longest = min(longest, self._at_least(float(self._falling[sampling.top_k - 1]) - margin))
        if sampling.top_p < 1:
            shortest, longest = self._nucleus(margin, shortest, longest)
        return max(shortest, 1), max(longest, 1)

    def _nucleus(self, margin: float, shortest: int, longest: int) -> tuple[int, int]:
        """top_p keeps a token if the mass before it, in what min_p and top_k left, is below top_p."""
        grow, shrink = math.exp(margin / 2), math.exp(-margin / 2)
        shortest = max(shortest, 1)

        def surely_kept(place: int) -> bool:
            before = min(self._at_least(float(self._falling[place]) - margin) - 1, shortest)
            mass = self._mass[before] * grow
            rest = (self._mass[shortest] - self._mass[before]) * shrink
            return bool(mass < self._sampling.top_p * (mass + rest))

        def possibly_kept(place: int) -> bool:
            before = self._above(float(self._falling[place]) + margin)
            mass = self._mass[before] * shrink
            rest = (self._mass[longest] - self._mass[before]) * grow
            return bool(mass <= self._sampling.top_p * (mass + rest) * (1 + 1e-5))

        return _prefix(surely_kept, shortest), _prefix(possibly_kept, longest)


def _prefix(holds: Callable[[int], bool], length: int) -> int:
    """The number of leading places where `holds`, which is true up to some place and false from it on."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if holds(middle) else (low, middle)
    return low
