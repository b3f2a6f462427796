"""The native sampler against numpy's: the same tokens to the bit, on every instruction set of this machine."""

from __future__ import annotations

import ctypes
import dataclasses
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masks import FixedMask, mask_of
from native.compiling import COMPILER, HERE, ISAS, SANITIZED, Compiled, engine, run
from native.step_model import Config, NativeModel, random_weights
from unit.engine.test_sampler import CHI_SQUARE_DRAWS, chi_square

from kvferry.engine.native import sampler as packing
from kvferry.engine.native.library import Library
from kvferry.engine.native.sampler import NativeSampler
from kvferry.engine.sampling.sampler import sample
from kvferry.schedule.step import MAX_LOGPROBS, Draw
from kvferry.wire.sampling import Sampling

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
SAMPLER = engine("draw_weights", "descent", "penalties", "logprobs", "sample")


@pytest.fixture(scope="session", params=ISAS)
def library(request: pytest.FixtureRequest, compiled: Compiled) -> ctypes.CDLL:
    return ctypes.CDLL(str(compiled.product(request.param)))


BROKEN = [float("nan"), float("inf"), float("-inf"), 3e38, -3e38]


@st.composite
def rows(draw: st.DrawFn) -> np.ndarray:
    """Logits [vocab] of a random kind: smooth, with many ties, flat, peaked, or broken."""
    vocab = draw(st.one_of(st.integers(1, 70), st.sampled_from([127, 1000, 4099])))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    row: np.ndarray = (rng.normal(0, 1, vocab) * draw(st.sampled_from([0, 0.01, 1, 4, 30]))).astype(np.float32)
    if draw(st.booleans()):
        row = row.round(draw(st.integers(0, 2)))
    for place in draw(st.lists(st.integers(0, vocab - 1), max_size=3)):
        row[place] = draw(st.sampled_from([*BROKEN, 0.0, 20.0]))
    return row


@st.composite
def masks(draw: st.DrawFn, vocab: int) -> FixedMask:
    """Few tokens, about half of them, or all but few."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    allowed = rng.random(vocab) < draw(st.sampled_from([0.02, 0.5, 0.98]))
    allowed[draw(st.integers(0, vocab - 1))] = True
    return mask_of(allowed)


@st.composite
def draws(draw: st.DrawFn, vocab: int) -> Draw:
    tokens = st.lists(st.integers(0, vocab - 1), max_size=12)
    history = draw(tokens)
    penalty = st.sampled_from([-2.0, 0.0, 0.0, 0.7, 2.0])
    return Draw(
        Sampling(
            temperature=draw(st.sampled_from([0.0, 1e-4, 0.3, 1.0, 1.0, 2.5, 100.0])),
            top_p=draw(st.one_of(st.just(1.0), st.floats(1e-9, 1.0))),
            top_k=draw(st.one_of(st.just(0), st.integers(1, 2 * vocab), st.just(1 << 40))),
            min_p=draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0))),
            seed=draw(st.integers(0, 2**64 - 1)),
            presence_penalty=draw(penalty),
            frequency_penalty=draw(penalty),
            repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.2])),
        ),
        choice=draw(st.integers(0, 2**32 - 1)),
        index=draw(st.integers(0, 2**32 - 1)),
        tokens=np.asarray(history, np.uint32),
        num_prompt=draw(st.integers(0, len(history))),
        logit_bias=tuple(draw(st.lists(st.tuples(st.integers(0, vocab - 1), st.floats(-100, 100)), max_size=3))),
        banned=tuple(draw(st.lists(st.integers(0, vocab - 1), max_size=3))),
        num_logprobs=draw(st.one_of(st.none(), st.integers(0, min(vocab, MAX_LOGPROBS)))),
        mask=draw(st.one_of(st.none(), masks(vocab))),
    )


@settings(max_examples=250)
@given(st.data())
def test_tokens_and_logprobs_equal_those_of_numpy_to_the_bit(library: ctypes.CDLL, data: st.DataObject) -> None:
    row = data.draw(rows())
    wanted = data.draw(st.lists(draws(len(row)), min_size=1, max_size=4))
    logits = np.stack([np.roll(row, shift) for shift in range(len(wanted))])
    before = logits.copy()
    native, reference = NativeSampler(library, len(row)).sample(logits, wanted), sample(logits, wanted)
    assert native.tokens == reference.tokens
    assert repr(native.logprobs) == repr(reference.logprobs)  # NaN equals itself there
    assert np.array_equal(logits, before, equal_nan=True), "the logits were changed"


def many(vocab: int, count: int, seed: int) -> tuple[np.ndarray, list[Draw]]:
    """Rows as a model gives them (rounded to bf16), and draws of all kinds."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (count, vocab)).astype(np.float32)
    logits = (logits.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    history = rng.integers(0, vocab, 300).astype(np.uint32)
    kinds = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"temperature": 0.0}, {"repetition_penalty": 1.1}]
    return logits, [
        Draw(Sampling(seed=seed, **kinds[row % len(kinds)]), 0, row, history, 200, num_logprobs=row % 3 or None)
        for row in range(count)
    ]


def test_a_large_vocabulary_equals_numpy(library: ctypes.CDLL) -> None:
    logits, wanted = many(49_152, 24, 1)
    assert NativeSampler(library, 49_152).sample(logits, wanted) == sample(logits, wanted)


def test_a_draw_depends_on_its_own_row_alone(library: ctypes.CDLL) -> None:
    logits, wanted = many(5003, 30, 2)
    sampler = NativeSampler(library, 5003)
    together = sampler.sample(logits, wanted)
    order = np.random.default_rng(3).permutation(30)
    shuffled = sampler.sample(logits[order], [wanted[row] for row in order])
    assert shuffled.tokens == [together.tokens[row] for row in order]
    for row in range(30):
        alone = sampler.sample(logits[row : row + 1], wanted[row : row + 1])
        assert (alone.tokens[0], alone.logprobs[0]) == (together.tokens[row], together.logprobs[row])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_models_threads_share_the_rows_and_change_nothing(compiled: Compiled, threads: int) -> None:
    config = Config(vocab_size=999)
    whole = Library(compiled.product(ISAS[0]))
    logits, wanted = many(999, 13, 2)
    expected = sample(logits, wanted)
    with NativeModel(whole, config, random_weights(config, 1), threads=threads, num_blocks=1) as model:
        sampler = NativeSampler(whole.c, 999, model.handle.value)
        for count in (13, 1, 0, 3, 13):
            found = sampler.sample(logits[:count], wanted[:count])
            assert (found.tokens, found.logprobs) == (expected.tokens[:count], expected.logprobs[:count])
        broken = [*wanted[:12], dataclasses.replace(wanted[12], num_prompt=301, sampling=Sampling(presence_penalty=1))]
        with pytest.raises(RuntimeError, match="kvf_sample"):
            sampler.sample(logits, broken)


MUTANTS = {
    "min_p loses its border": ("draw_weights", "weight[lane] >= floor", "weight[lane] > floor"),
    "top_k keeps one more": ("sample", "by_rank(draw.top_k - 1)", "by_rank(draw.top_k)"),
    "top_p keeps one more": ("sample", "static_cast<uint64_t>(wanted) - 1", "static_cast<uint64_t>(wanted)"),
    "a mask slips by a token": ("penalties", "(token % kWordBits)", "((token + 1) % kWordBits)"),
    "ties go to the higher id": ("descent", "tokens[place]", "tokens[candidates.count - 1 - place]"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_planted_fault_of_one_line_shows_in_the_comparison(compiled: Compiled, tmp_path: Path, mutant: str) -> None:
    name, right, wrong = MUTANTS[mutant]
    (source,) = engine(name)
    text = source.read_text()
    assert text.count(right) == 1, "the fault can't be planted"
    changed = tmp_path / source.name
    changed.write_text(text.replace(right, wrong))
    target = compiled.library(["-O1"], [changed if path == source else path for path in SAMPLER])
    library, rng = ctypes.CDLL(str(target)), np.random.default_rng(4)
    different = 0
    for seed in range(400):
        logits = rng.integers(-1, 1, (3, 3 + seed % 3)).astype(np.float32)  # two values: ties at every border
        filters = [{"min_p": 1.0}, {"top_k": 2}, {"top_p": 0.5}, {}]
        mask = mask_of(np.arange(logits.shape[1]) != 1) if seed % 5 == 0 else None
        wanted = [Draw(Sampling(seed=seed, **filters[seed % len(filters)]), 0, index, mask=mask) for index in range(3)]
        native = NativeSampler(library, logits.shape[1]).sample(logits, wanted)
        different += native != sample(logits, wanted)
    assert different


def test_draws_of_the_native_sampler_follow_the_distribution(library: ctypes.CDLL) -> None:
    logits = np.random.default_rng(6).normal(0, 1, 60).astype(np.float32)
    sampler, tokens = NativeSampler(library, 60), []
    for start in range(0, CHI_SQUARE_DRAWS, 4000):
        wanted = [Draw(Sampling(seed=21), 1, start + index) for index in range(4000)]
        tokens += sampler.sample(np.repeat(logits[None], 4000, axis=0), wanted).tokens
    for temperature, right in ((1.0, True), (1.15, False)):
        weights = np.exp(logits.astype(np.float64) / temperature)
        statistic, limit = chi_square(tokens, weights / weights.sum())
        assert (statistic < limit) is right, temperature


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": np.asarray([50], np.uint32)}, {"banned": (50,)}, {"logit_bias": ((50, 1.0),)},
        {"num_prompt": 2}, {"num_logprobs": MAX_LOGPROBS + 1},
        {"sampling": Sampling(temperature=-1.0)}, {"sampling": Sampling(top_p=0.0)},
        {"sampling": Sampling(min_p=float("nan"))}, {"sampling": Sampling(repetition_penalty=0.0)},
        {"mask": FixedMask(np.asarray([0, 1 << 18], np.uint32))},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_a_field_out_of_bounds_is_an_error_and_no_token(library: ctypes.CDLL, change: dict[str, object]) -> None:
    sampling = Sampling(presence_penalty=1.0)
    draw = Draw(sampling, 0, 0, np.asarray([49], np.uint32), 1)
    sampler, logits = NativeSampler(library, 50), np.zeros((1, 50), np.float32)
    assert sampler.sample(logits, [draw]).tokens
    with pytest.raises(RuntimeError, match="kvf_sample"):
        sampler.sample(logits, [dataclasses.replace(draw, **change)])


def test_a_mask_of_another_size_is_refused(library: ctypes.CDLL) -> None:
    sampler, logits = NativeSampler(library, 50), np.zeros((1, 50), np.float32)
    for words in (np.ones(1, np.uint32), np.ones(3, np.uint32), np.ones(2, np.int32)):
        with pytest.raises(RuntimeError, match="a mask of shape"):
            sampler.sample(logits, [Draw(Sampling(), 0, 0, mask=FixedMask(words))])  # type: ignore[arg-type]


def test_logits_of_another_shape_or_type_or_order_are_refused(library: ctypes.CDLL) -> None:
    sampler, draw = NativeSampler(library, 50), Draw(Sampling(), 0, 0)
    for logits in (np.zeros((1, 49), np.float32), np.zeros((1, 50)), np.zeros((2, 50), np.float32)):
        with pytest.raises(RuntimeError, match="logits of shape"):
            sampler.sample(logits, [draw])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="logits of shape"):
        sampler.sample(np.zeros((50, 2), np.float32).T, [draw, draw])
    with pytest.raises(RuntimeError, match="out of bounds"):
        NativeSampler(library, 0)
    assert sampler.sample(np.zeros((0, 50), np.float32), []).tokens == []


def test_a_batch_of_seeded_draws_is_many_times_faster_than_numpys(library: ctypes.CDLL) -> None:
    vocab = 49_152
    logits = np.random.default_rng(8).normal(0, 3, (8, vocab)).astype(np.float32)
    wanted = [Draw(Sampling(seed=row), 0, 0) for row in range(8)]
    sampler = NativeSampler(library, vocab)

    def best(call: object, tries: int) -> float:
        taken = []
        for _ in range(tries):
            start = time.perf_counter()
            call(logits, wanted)  # type: ignore[operator]
            taken.append(time.perf_counter() - start)
        return min(taken)

    assert best(sampler.sample, 20) * 5 < best(sample, 3)  # about 100 times, on an idle machine


@pytest.mark.parametrize("planted", [False, True], ids=["as it is", "with an overrun"])
def test_random_batches_stay_within_their_buffers(compiled: Compiled, planted: bool) -> None:
    """Under the address and undefined-behaviour sanitizers, which find a planted overrun."""
    program = compiled.program(SANITIZED, (*SAMPLER, HERE / "sample_sanitized.cpp"))
    if planted:
        assert "heap-buffer-overflow" in run([program, "overrun"], fails=True)
    else:
        run([program])


def test_the_packed_fields_have_the_layout_of_the_header() -> None:
    assert (packing._DRAW.size, packing._LOGPROBS.itemsize) == (120, 168)  # `static_assert` of sample.cpp
