"""Exactness of the native runner as a property: whatever happened to a sequence, its logits and KV have the same bits.

The negative control is a build whose sums over K are split when a step has many rows: the same property refutes it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from checkpoints import SHAPES, build
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from native.compiling import COMPILER, ISAS, SPLIT_K, Compiled, product
from native.journeys import BLOCK, MAX_LEN, NUM_BLOCKS, Journey, kv_of, table_of, texts

from kvferry.engine.native.library import Library
from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.schedule.step import SequenceStep, StepPlan

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
NAMES = ("llama-gqa3-tied", "mistral-window", "qwen2-upper-window", "qwen3-qk-norm")
Property = Callable[[], None]
RULES = settings(
    max_examples=16,
    derandomize=True,  # a build is judged by the same journeys on every machine
    phases=(Phase.generate,),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {shape.name: build(shape, folder / shape.name) for shape in SHAPES if shape.name in NAMES}


class Runners:
    """A pair with different numbers of threads to travel on, and a third to be alone on."""

    def __init__(self, library: Library, checkpoint: Path, quantization: str = "none") -> None:
        self.made = [
            NativeRunner(
                EngineSettings(
                    checkpoint, dtype="bfloat16", quantization=quantization, block_size=BLOCK, num_blocks=NUM_BLOCKS,
                    max_model_len=MAX_LEN, threads=threads,
                ),
                library=library,
            )
            for threads in (2, 3, 1)
        ]  # fmt: skip

    def judge(self, data: st.DataObject) -> Counter[str]:
        """One journey, each of whose sequences must end as if it had been alone. Returns what happened on it."""
        one, other, alone = self.made
        pair = (one, other) if data.draw(st.booleans()) else (other, one)
        journey = Journey(data, pair, data.draw(texts(alone.vocab_size)))
        journey.run()
        for each in journey.travellers:
            blocks = list(range(len(each.blocks)))
            (expected,) = alone.logits(StepPlan((SequenceStep(0, each.text, 0, table_of(blocks)),)))
            for position, logits in each.rows:
                assert np.array_equal(logits, expected[position : position + len(logits)]), "logits differ"
            length = len(each.text)
            assert kv_of(each.place.runner, each.blocks, length) == kv_of(alone, blocks, length), "KV differs"
        return journey.acts

    def close(self) -> None:
        for runner in self.made:
            runner.close()


@pytest.fixture
def runners() -> Iterator[Callable[..., Runners]]:
    made: list[Runners] = []

    def make(*arguments: object, **fields: object) -> Runners:
        made.append(Runners(*arguments, **fields))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.close()


def property_of(runners: Runners, happened: Counter[str]) -> Property:
    @RULES
    @given(st.data())
    def holds(data: st.DataObject) -> None:
        happened.update(runners.judge(data))

    return holds


CASES = [
    *((isa, NAMES[0], "none") for isa in ISAS),
    *((ISAS[0], name, "none") for name in NAMES[1:]),
    (ISAS[0], NAMES[0], "int8"),
]


@pytest.mark.parametrize(("isa", "name", "quantization"), CASES, ids=map("-".join, CASES))
def test_whatever_happens_to_a_sequence_its_bits_are_those_of_the_text_alone(
    checkpoints: dict[str, Path],
    runners: Callable[..., Runners],
    compiled: Compiled,
    isa: str,
    name: str,
    quantization: str,
) -> None:
    library = Library(compiled.product(isa))
    happened: Counter[str] = Counter()
    property_of(runners(library, checkpoints[name], quantization), happened)()
    assert all(happened[act] >= 5 for act in ("mixed step", "hand over", "preempt", "prefix hit")), happened


def test_a_build_that_splits_k_by_the_number_of_rows_is_refuted(
    checkpoints: dict[str, Path], runners: Callable[..., Runners], compiled: Compiled
) -> None:
    library = Library(compiled.library(product(ISAS[0]), own=SPLIT_K))
    with pytest.raises(AssertionError, match="differ"):
        property_of(runners(library, checkpoints[NAMES[0]]), Counter())()
