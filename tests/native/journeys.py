"""Random journeys of sequences through two runners: steps in any company, hand-offs, preemptions, shared prefixes.

A journey is driven by hypothesis, keeps a block pool of its own per runner, and poisons every block that becomes free.
At its end `found` holds the logits and KV of each sequence, to compare with those of the same text run alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from kvferry.engine.native.runner import NativeRunner
from kvferry.schedule.step import SequenceStep, StepPlan
from kvferry.wire.frame import Piece

BLOCK = 16
NUM_BLOCKS = 80
MAX_LEN = 160
Texts = list[npt.NDArray[np.uint32]]
MAX_ACTS = 60


def table_of(blocks: list[int]) -> npt.NDArray[np.int32]:
    return np.asarray(blocks, np.int32)


def kv_of(runner: NativeRunner, blocks: list[int], num_tokens: int) -> bytes:
    piece = Piece(0, runner.kv_format.num_layers, 0, num_tokens, 0, runner.kv_format.num_kv_heads)
    return bytes(gathered(runner, piece, blocks))


def gathered(runner: NativeRunner, piece: Piece, blocks: list[int]) -> bytearray:
    frame = bytearray(piece.num_bytes(runner.kv_format.head_dim, runner.kv_format.dtype))
    runner.gather(piece, table_of(blocks), memoryview(frame))
    return frame


@st.composite
def texts(draw: st.DrawFn, vocab_size: int) -> Texts:
    """One to four texts; some begin as the first does. From one token to the whole context."""
    random = np.random.default_rng(draw(st.integers(0, 1000)))
    length = st.one_of(st.sampled_from([1, 2, BLOCK, MAX_LEN]), st.integers(1, MAX_LEN))
    made = [random.integers(0, vocab_size, draw(length)).astype(np.uint32) for _ in range(draw(st.integers(1, 4)))]
    for text in made[1:]:
        shared = min(draw(st.sampled_from([0, 1, 16, 40, 64, MAX_LEN])), len(text), len(made[0]))
        text[:shared] = made[0][:shared]
    return made


@dataclass
class Place:
    """A runner and who holds its blocks."""

    runner: NativeRunner
    free: list[int]
    holders: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._poison(self.free)

    def take(self, count: int) -> list[int]:
        return [self.hold(self.free.pop()) for _ in range(count)]

    def hold(self, block: int) -> int:
        self.holders[block] += 1
        return block

    def release(self, blocks: list[int]) -> None:
        self.holders.subtract(blocks)
        freed = [block for block in blocks if not self.holders[block]]
        self._poison(freed)
        self.free = freed + self.free

    def _poison(self, blocks: list[int]) -> None:
        """With NaN in bf16."""
        kv = self.runner.kv_format
        piece = Piece(0, kv.num_layers, 0, BLOCK, 0, kv.num_kv_heads)
        content = memoryview(b"\xff" * piece.num_bytes(kv.head_dim, kv.dtype))
        for block in blocks:
            self.runner.scatter(piece, table_of([block]), content)


@dataclass
class Traveller:
    """A sequence: where it is, how far, and the logits of every row that was ever computed for it."""

    text: npt.NDArray[np.uint32]
    place: Place
    blocks: list[int]
    done: int = 0
    rows: list[tuple[int, npt.NDArray[np.float32]]] = field(default_factory=list)  # (position of the first, logits)


class Journey:
    """`acts` counts what happened, so that a test can demand that it did."""

    def __init__(self, data: st.DataObject, runners: tuple[NativeRunner, NativeRunner], wanted: Texts) -> None:
        self._data = data
        self._random = np.random.default_rng(data.draw(st.integers(0, 1000)))
        self._places = [Place(each, self._random.permutation(NUM_BLOCKS).tolist()) for each in runners]
        self.travellers = [Traveller(text, self._places[0], []) for text in wanted]
        for each in self.travellers:
            each.blocks = each.place.take(-(-len(each.text) // BLOCK))
        self.acts: Counter[str] = Counter()

    def run(self) -> None:
        """Until every sequence is whole; after `MAX_ACTS` nothing but steps is done."""
        for _ in range(MAX_ACTS):
            self._act(self._data.draw(st.sampled_from(["step", "step", "step", "hand over", "preempt"])))
        while self._running(self._places[0]) or self._running(self._places[1]):
            self._act("step")
        for place in self._places:
            assert set(place.free).isdisjoint(+place.holders)

    def _act(self, name: str) -> None:
        {"step": self._step, "hand over": self._hand_over, "preempt": self._preempt}[name]()

    def _running(self, place: Place) -> list[Traveller]:
        return [each for each in self.travellers if each.place is place and each.done < len(each.text)]

    def _step(self) -> None:
        """Some sequences of one runner, in any order, by chunks of any size."""
        place = self._places[self._data.draw(st.integers(0, 1))]
        if not (running := self._running(place)):
            place = self._places[1 - self._places.index(place)]
            if not (running := self._running(place)):
                return
        order = self._data.draw(st.permutations(running))
        chosen = order[: self._data.draw(st.integers(1, len(order)))]
        sizes = [self._data.draw(st.sampled_from([1, 1, 2, 7, 16, 33, 65, MAX_LEN])) for _ in chosen]
        steps = [
            SequenceStep(index, each.text[each.done : each.done + size], each.done, table_of(each.blocks))
            for index, (each, size) in enumerate(zip(chosen, sizes, strict=True))
        ]
        for each, step, logits in zip(chosen, steps, place.runner.logits(StepPlan(tuple(steps))), strict=True):
            each.rows.append((each.done, logits))
            each.done += len(step.tokens)
        self.acts["mixed step" if len(chosen) > 1 else "step"] += 1

    def _hand_over(self) -> None:
        """KV of a sequence goes to the other runner, in pieces of tokens, layers and heads, into other blocks."""
        each = self._data.draw(st.sampled_from(self.travellers))
        here, there = each.place, self._places[1 - self._places.index(each.place)]
        if not each.done:
            return
        blocks = there.take(len(each.blocks))
        kv = here.runner.kv_format
        cut, layer = self._data.draw(st.integers(0, each.done)), self._data.draw(st.integers(0, kv.num_layers))
        head = self._data.draw(st.integers(0, kv.num_kv_heads))
        for tokens in ((0, cut), (cut, each.done)):
            for layers in ((0, layer), (layer, kv.num_layers)):
                for heads in ((0, head), (head, kv.num_kv_heads)):
                    if all(start < end for start, end in (tokens, layers, heads)):
                        piece = Piece(*layers, *tokens, *heads)
                        frame = gathered(here.runner, piece, each.blocks)
                        there.runner.scatter(piece, table_of(blocks), memoryview(frame))
        here.release(each.blocks)
        each.place, each.blocks = there, blocks
        self.acts["hand over"] += 1

    def _preempt(self) -> None:
        """A sequence loses its blocks; it begins again in others, behind what another one has of the same prefix."""
        each = self._data.draw(st.sampled_from(self.travellers))
        if not each.done:
            return
        each.place.release(each.blocks)
        shared: list[int] = []
        for other in self.travellers:
            if other is not each and other.place is each.place:
                same = np.cumprod(each.text[: other.done] == other.text[: min(other.done, len(each.text))]).sum()
                # The last token is always computed: its logits are wanted.
                shared = max(shared, other.blocks[: min(int(same), len(each.text) - 1) // BLOCK], key=len)
        fresh = each.place.take(len(each.blocks) - len(shared))
        each.blocks = [each.place.hold(block) for block in shared] + fresh
        each.done = len(shared) * BLOCK
        self.acts["prefix hit" if shared else "preempt"] += 1
