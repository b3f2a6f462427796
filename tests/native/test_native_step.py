"""Whole steps of the native engine: against fp64, and to the bit whatever the batch, chunks, threads and pages."""

from __future__ import annotations

import ctypes
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from native.compiling import COMPILER, HERE, ISAS, LIBRARY, RACES, SANITIZED, Compiled, product, run
from native.step_model import (
    Config,
    NativeModel,
    Reference,
    Rows,
    Tokens,
    Words,
    piece_shape,
    placed_words,
    random_weights,
    rope_tables,
    whole_piece,
)

from kvferry.engine.native.library import SEQUENCE, Cache, Library, Piece, Wanted, Weight

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
LENGTH = 200  # positions: four steps of attention, and no whole number of pages

SHAPES = {
    "llama": Config(num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=96, intermediate_size=160),
    "qwen2": Config(num_heads=14, num_kv_heads=2, head_dim=64, hidden_size=70, qkv_bias=1, tied=0),
    "qwen3": Config(num_heads=4, num_kv_heads=2, head_dim=128, qk_norm=1, block_size=32),
    "all biases, 1:1": Config(num_heads=2, num_kv_heads=2, head_dim=80, qkv_bias=1, output_bias=1, mlp_bias=1),
    "8:1, head size 96, odd sizes": Config(num_heads=8, head_dim=96, hidden_size=33, intermediate_size=49),
    "head size 20": Config(num_heads=2, head_dim=20, vocab_size=7, qk_norm=1),
    "windows": Config(windows=(7, 0, 64, 65), num_layers=4),
    "more query heads than a tile has rows": Config(num_heads=11, head_dim=16, num_layers=1),
    "int8": Config(num_heads=9, num_kv_heads=3, head_dim=64, hidden_size=96, intermediate_size=160, quantization=1),
    "int8, untied, odd sizes": Config(
        num_heads=4, num_kv_heads=2, head_dim=20, hidden_size=70, intermediate_size=49,
        tied=0, qkv_bias=1, quantization=1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=ISAS)
def library(request: pytest.FixtureRequest, compiled: Compiled) -> Library:
    return Library(compiled.product(request.param))


@pytest.fixture(scope="module")
def best_library(compiled: Compiled) -> Library:
    return Library(compiled.product(ISAS[0]))


@pytest.fixture
def model(library: Library) -> Iterator[Callable[..., NativeModel]]:
    """Makes models and closes them."""
    made: list[NativeModel] = []

    def make(config: Config, **settings: int) -> NativeModel:
        made.append(NativeModel(library, config, random_weights(config, 1), **settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


def random_tokens(config: Config, count: int = LENGTH, seed: int = 0) -> Tokens:
    return np.random.default_rng(seed).integers(0, config.vocab_size, count).astype(np.uint32)


def shuffled_table(config: Config, num_blocks: int = 64, seed: int = 0, length: int = LENGTH) -> npt.NDArray[np.int32]:
    order = np.random.default_rng(seed).permutation(num_blocks)
    return order[: -(-length // config.block_size)].astype(np.int32)


def bits(logits: npt.NDArray[np.float32]) -> bytes:
    return logits.tobytes()


def error_share(logits: npt.NDArray[np.float32], reference: npt.NDArray[np.float64]) -> float:
    """Root mean square of the error over that of the logits."""
    return float(np.sqrt(np.square(logits - reference).mean() / np.square(reference).mean()))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_agree_with_fp64_at_the_same_rounding_points(model: Callable[..., NativeModel], name: str) -> None:
    config, tokens = SHAPES[name], random_tokens(SHAPES[name])
    native = model(config)
    (logits,) = native.step(Rows(tokens, 0, shuffled_table(config)))
    reference = Reference(config, native.weights)
    # In int8 a bit that fell the other way is a step of 1/127 where a row is quantised next, in bf16 one of 1/256.
    bound = 0.035 if config.quantization else 0.02
    assert error_share(logits, reference.logits(tokens)) < bound
    # The measure sees small faults: the first of 200 tokens is another one.
    other = tokens.copy()
    other[0] = (other[0] + 1) % config.vocab_size
    assert error_share(logits, reference.logits(other)) > bound


def test_what_int8_costs_is_within_its_bound(model: Callable[..., NativeModel]) -> None:
    """Against the weights as they were before: what quantising does to random logits, and no more."""
    config, tokens = SHAPES["int8"], random_tokens(SHAPES["int8"])
    native = model(config)
    (logits,) = native.step(Rows(tokens, 0, shuffled_table(config)))
    share = error_share(logits, Reference(replace(config, quantization=0), native.weights).logits(tokens))
    assert 0.005 < share < 0.06  # from below: it was quantised


def test_a_window_that_is_off_by_one_is_seen(model: Callable[..., NativeModel]) -> None:
    config, tokens = SHAPES["windows"], random_tokens(SHAPES["windows"])
    native = model(config)
    (logits,) = native.step(Rows(tokens, 0, shuffled_table(config)))
    off = Config(windows=(8, 0, 64, 65), num_layers=4)
    assert error_share(logits, Reference(off, native.weights).logits(tokens)) > 0.05


@pytest.mark.parametrize("name", SHAPES)
def test_bits_do_not_depend_on_chunks_threads_or_tables(model: Callable[..., NativeModel], name: str) -> None:
    config, tokens = SHAPES[name], random_tokens(SHAPES[name])
    expected: tuple[bytes, bytes] | None = None
    for threads in (1, 2, 3):
        native = model(config, threads=threads)
        rng = np.random.default_rng(threads)
        for chunk in ([LENGTH], [1, 17, 64, 5], [3, 1, 1, 40]):
            table = shuffled_table(config, seed=int(rng.integers(1 << 30)))
            parts, start = [], 0
            while start < LENGTH:
                count = min(int(rng.choice(chunk)), LENGTH - start)
                parts += native.step(Rows(tokens[start : start + count], start, table))
                start += count
            found = bits(np.concatenate(parts)), native.frame(table, 0, LENGTH).tobytes()
            assert found == (expected or found)
            expected = found


@settings(max_examples=30)
@given(data=st.data())
@pytest.mark.parametrize("name", ["llama", "windows", "8:1, head size 96, odd sizes", "int8"])
def test_bits_do_not_depend_on_what_else_is_in_the_batch(best_library: Library, name: str, data: st.DataObject) -> None:
    config = SHAPES[name]
    num_sequences = data.draw(st.integers(2, 5))
    prompts = [random_tokens(config, data.draw(st.integers(1, 90)), seed) for seed in range(num_sequences)]
    weights = random_weights(config, 1)
    tables = np.random.default_rng(data.draw(st.integers(0, 99))).permutation(64).astype(np.int32)
    per = 90 // config.block_size + 1
    with (
        NativeModel(best_library, config, weights, threads=data.draw(st.integers(1, 3))) as mixed,
        NativeModel(best_library, config, weights) as alone,
    ):
        done = [0] * num_sequences
        parts: list[list[npt.NDArray[np.float32]]] = [[] for _ in prompts]
        while any(done[i] < len(prompts[i]) for i in range(num_sequences)):
            running = [i for i in range(num_sequences) if done[i] < len(prompts[i])]
            chosen = data.draw(st.lists(st.sampled_from(running), min_size=1, unique=True))
            batch = []
            for i in chosen:
                count = min(data.draw(st.sampled_from([1, 2, 7, 33, 90])), len(prompts[i]) - done[i])
                tokens = prompts[i][done[i] : done[i] + count].copy()
                batch.append(Rows(tokens, done[i], tables[i * per : (i + 1) * per].copy()))
                done[i] += count
            for i, logits in zip(chosen, mixed.step(*batch), strict=True):
                parts[i].append(logits)
        for i, prompt in enumerate(prompts):
            table = np.arange(per, dtype=np.int32)
            (expected,) = alone.step(Rows(prompt, 0, table))
            assert bits(np.concatenate(parts[i])) == bits(expected)
            own = tables[i * per : (i + 1) * per].copy()
            assert mixed.frame(own, 0, len(prompt)).tobytes() == alone.frame(table, 0, len(prompt)).tobytes()


def test_last_rows_logits_are_those_of_all_rows(model: Callable[..., NativeModel]) -> None:
    config = SHAPES["llama"]
    native = model(config, threads=2)
    tokens = [random_tokens(config, count, count) for count in (30, 1, 64, 9)]
    tables = [np.arange(i * 4, i * 4 + 4, dtype=np.int32) for i in range(4)]
    every = native.step(*(Rows(own, 0, table) for own, table in zip(tokens, tables, strict=True)))
    wanted = (Wanted.LAST, Wanted.NONE, Wanted.LAST, Wanted.ALL)
    some = native.step(*(Rows(own, 0, tab, want) for own, tab, want in zip(tokens, tables, wanted, strict=True)))
    assert [bits(part) for part in some] == [bits(every[0][-1:]), b"", bits(every[2][-1:]), bits(every[3])]


def test_a_cached_prefix_of_another_sequence_gives_the_same_bits(model: Callable[..., NativeModel]) -> None:
    config, tokens = SHAPES["qwen3"], random_tokens(SHAPES["qwen3"])
    native = model(config)
    (whole,) = native.step(Rows(tokens, 0, shuffled_table(config, seed=1)))
    first = shuffled_table(config, seed=1)
    unused = [block for block in range(64) if block not in first]
    second = np.concatenate((first[:3], unused[:4])).astype(np.int32)  # shares three blocks of 32
    cached = 3 * config.block_size
    (rest,) = native.step(Rows(tokens[cached:].copy(), cached, second))
    assert bits(rest) == bits(whole[cached:])


def test_kv_that_was_moved_gives_the_same_bits(model: Callable[..., NativeModel]) -> None:
    config, tokens = SHAPES["llama"], random_tokens(SHAPES["llama"])
    source, target = model(config), model(config, threads=2)
    table, other = shuffled_table(config, seed=1), shuffled_table(config, seed=2)
    (whole,) = source.step(Rows(tokens, 0, table))
    for start, end in ((0, 37), (37, 38), (38, 150)):
        frame = source.frame(table, start, end)
        target.transfer("kvf_scatter", whole_piece(config, start, end), other, frame)
    (rest,) = target.step(Rows(tokens[150:].copy(), 150, other))
    assert bits(rest) == bits(whole[150:])


def test_copied_blocks_can_be_continued_apart(model: Callable[..., NativeModel]) -> None:
    config, tokens = SHAPES["llama"], random_tokens(SHAPES["llama"])
    native = model(config)
    table = np.arange(13, dtype=np.int32)
    (whole,) = native.step(Rows(tokens, 0, table))
    copy = table + 20
    pairs = np.stack((table, copy), 1)
    native.library.call(native.library.c.kvf_copy_blocks, ctypes.byref(native.blocks), pairs.ctypes.data, len(pairs))
    native.step(Rows(tokens[::-1][:100].copy(), 100, table))  # the original goes another way
    (rest,) = native.step(Rows(tokens[100:].copy(), 100, copy))
    assert bits(rest) == bits(whole[100:])


def test_what_lies_before_every_window_does_not_matter(model: Callable[..., NativeModel]) -> None:
    config = Config(windows=(40, 7), num_heads=4)
    tokens, table = random_tokens(config), np.arange(13, dtype=np.int32)
    native = model(config)
    (whole,) = native.step(Rows(tokens, 0, table))
    for start, bound in ((150, 110), (199, 159)):
        poison = np.full(piece_shape(config, whole_piece(config, 0, bound)), 0xFFFF, np.uint16)
        native.transfer("kvf_scatter", whole_piece(config, 0, bound), table, poison)
        (rest,) = native.step(Rows(tokens[start:].copy(), start, table))
        assert bits(rest) == bits(whole[start:])
    # One position later is inside the first layer's window.
    native.transfer("kvf_scatter", whole_piece(config, 159, 161), table, np.full_like(poison, 0xFFFF)[:, :, :2].copy())
    (rest,) = native.step(Rows(tokens[199:].copy(), 199, table))
    assert np.isnan(rest).all()


@pytest.mark.parametrize("head_dim", [20, 64, 96])
def test_a_later_token_that_is_not_finite_leaves_earlier_rows_alone(
    model: Callable[..., NativeModel], head_dim: int
) -> None:
    config = Config(tied=0, head_dim=head_dim)
    weights = random_weights(config, 1)
    tokens = np.arange(48, dtype=np.uint32)
    native = model(config)
    (clean,) = native.step(Rows(tokens, 0, np.arange(3, dtype=np.int32)))
    weights[Weight.EMBEDDING, 0][33] = 0x7FC0
    with NativeModel(native.library, config, weights) as broken:
        (found,) = broken.step(Rows(tokens, 0, np.arange(3, dtype=np.int32)))
    assert bits(found[:33]) == bits(clean[:33])
    assert np.isnan(found[33:]).all()


def test_nan_in_reused_pages_reaches_nothing(model: Callable[..., NativeModel]) -> None:
    for name in ("llama", "head size 20", "windows"):
        config, tokens = SHAPES[name], random_tokens(SHAPES[name])
        zeroed, poisoned = model(config, poison=0), model(config)
        assert (poisoned.cache == 0xFF).all()
        table = shuffled_table(config)
        for start, end in ((0, 50), (50, 51), (51, 130), (130, 131)):
            rows = Rows(tokens[start:end].copy(), start, table)
            (one,), (two,) = zeroed.step(rows), poisoned.step(rows)
            assert bits(one) == bits(two)
            assert np.isfinite(two).all()


def test_full_context_of_one_token_steps_at_the_limits_of_the_table(model: Callable[..., NativeModel]) -> None:
    config = Config(num_layers=1, max_len=67)
    tokens = random_tokens(config, 67)
    native = model(config, num_blocks=5)
    table = np.array([4, 0, 3, 1, 2], np.int32)
    (whole,) = native.step(Rows(tokens, 0, table))
    ones = [native.step(Rows(tokens[i : i + 1].copy(), i, table))[0] for i in range(67)]
    assert bits(np.concatenate(ones)) == bits(whole)
    with pytest.raises(RuntimeError, match="positions beyond"):
        native.step(Rows(tokens[:1].copy(), 67, table))


def test_steps_that_can_not_be_run_are_refused_and_write_nothing(model: Callable[..., NativeModel]) -> None:
    config = Config()
    native = model(config, num_blocks=8)
    before = native.cache.copy()
    good, token = np.arange(2, dtype=np.int32), np.zeros(1, np.uint32)
    refused = {
        "without rows": Rows(np.zeros(0, np.uint32), 0, good),
        "outside the vocabulary": Rows(np.array([0, config.vocab_size], np.uint32), 0, good),
        "positions beyond": Rows(token, 32, good),
        "block outside": Rows(np.zeros(20, np.uint32), 0, np.array([0, 8], np.int32)),
        "block outside ": Rows(token, 16, np.array([-1, 3], np.int32)),
        "positions beyond ": Rows(token, -1, good),
        "positions beyond  ": Rows(np.zeros(config.max_len + 1, np.uint32), 0, np.zeros(17, np.int32)),
    }
    for message, rows in refused.items():
        with pytest.raises(RuntimeError, match=message.strip()):
            native.step(Rows(np.zeros(5, np.uint32), 0, np.array([7], np.int32)), rows)
    assert np.array_equal(native.cache, before)
    assert not any(part.size for part in native.step())  # a step of nothing is one


def test_logits_can_be_had_in_parts_after_the_step(model: Callable[..., NativeModel]) -> None:
    config = Config()
    native = model(config, num_blocks=8)
    tokens = np.arange(20, dtype=np.uint32) % config.vocab_size
    rows = Rows(tokens, 0, np.arange(2, dtype=np.int32)), Rows(tokens[:9], 0, np.array([5], np.int32), Wanted.LAST)
    whole = np.concatenate(native.step(*rows))
    call, c, part = native.library.call, native.library.c, np.empty((7, config.vocab_size), np.float32)
    call(c.kvf_step, native.handle, *native.columns(rows), None)
    for first in (0, 5, 14):
        call(c.kvf_logits, native.handle, first, 7, part.ctypes.data)
        assert np.array_equal(part, whole[first : first + 7])
    for first, count, out in ((15, 7, part), (-1, 2, part), (0, -1, part), (0, 1, None)):
        with pytest.raises(RuntimeError):
            call(c.kvf_logits, native.handle, first, count, None if out is None else out.ctypes.data)
    with pytest.raises(RuntimeError):  # a step that is refused leaves nothing to have
        native.step(Rows(tokens, 0, np.array([8, 9], np.int32)))
    with pytest.raises(RuntimeError, match="order"):
        call(c.kvf_logits, native.handle, 0, 1, part.ctypes.data)


def test_shapes_and_loads_that_do_not_fit_are_refused(library: Library) -> None:
    config = Config()
    cos, sin = rope_tables(config)
    windows = np.zeros(config.num_layers, np.int32)
    error = ctypes.c_int32()

    def create(**changes: int) -> int | None:
        shape = config.shape(1)
        for name, value in changes.items():
            setattr(shape, name, value)
        handle: int | None = library.c.kvf_model_create(
            ctypes.byref(shape), windows.ctypes.data, cos.ctypes.data, sin.ctypes.data, ctypes.byref(error)
        )
        return handle

    for name, value in (
        ("num_layers", 0), ("head_dim", 7), ("head_dim", 1 << 20), ("block_size", 24), ("num_kv_heads", 2),
        ("threads", 0), ("threads", 1 << 20), ("vocab_size", 1 << 30), ("max_len", 0), ("tied", 2), ("quantization", 9),
        ("hidden_size", EDGE + 1), ("intermediate_size", EDGE + 1), ("num_heads", EDGE // 16 + 1),
        ("vocab_size", (1 << 22) + 1),
    ):  # fmt: skip
        assert create(**{name: value}) is None, name
        assert error.value < 0
    handle = create()
    assert handle
    assert error.value == 0
    rows = np.zeros((4, config.hidden_size), np.uint16)
    load = library.c.kvf_model_load
    for weight, layer, n, k, first in (
        (Weight.QKV, 2, 4, 48, 0), (Weight.QKV, 0, 4, 47, 0), (Weight.QKV, 0, 4, 48, config.qkv - 3),
        (Weight.QKV, 0, 4, 48, -1), (Weight.HEAD, 0, 4, 48, 0), (Weight.Q_NORM, 0, 4, 1, 0), (99, 0, 4, 48, 0),
        (Weight.QKV, 0, 0, 48, 0), (Weight.NORM, 1, 4, 1, 0),
    ):  # fmt: skip
        with pytest.raises(RuntimeError):
            library.call(load, handle, weight, layer, rows.ctypes.data, n, k, first)
    with pytest.raises(RuntimeError, match="not loaded"):
        library.call(library.c.kvf_model_finish, handle)
    library.c.kvf_model_free(handle)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("head_dim", [20, 64, 80, 128])
def test_pieces_are_what_their_definition_says(library: Library, head_dim: int, data: st.DataObject) -> None:
    """Scatter a known frame, then gather any rectangle of it; what was not written stays as it was."""
    config = Config(num_layers=3, num_heads=3, num_kv_heads=3, head_dim=head_dim, block_size=32, max_len=96)
    rng = np.random.default_rng(3)
    with NativeModel(library, config, random_weights(config, 1), num_blocks=5) as native:
        table = rng.permutation(5)[:3].astype(np.int32)
        whole = whole_piece(config, 0, 96)
        known = rng.integers(0, 1 << 16, piece_shape(config, whole), np.uint16)
        native.transfer("kvf_scatter", whole, table, known)

        def ranges(end: int) -> tuple[int, int]:
            first = data.draw(st.integers(0, end - 1))
            return first, data.draw(st.integers(first + 1, end))

        layers, heads, (start, end) = ranges(3), ranges(3), ranges(96)
        piece = Piece(*layers, start, end, *heads)
        window = np.s_[slice(*layers), :, start:end, slice(*heads)]
        # Frames at whole cache lines are written past the caches where their rows are whole lines, too.
        found, room = placed_words(piece_shape(config, piece), data.draw(st.sampled_from([0, 2, 32])))
        native.transfer("kvf_gather", piece, table, found)
        assert np.array_equal(found, known[window])
        found[:] = 0x5A5A
        assert (room == 0x5A5A).all(), "a gather wrote beside its frame"
        fresh = rng.integers(0, 1 << 16, found.shape, np.uint16)
        native.transfer("kvf_scatter", piece, table, fresh)
        known[window] = fresh
        assert np.array_equal(native.frame(table, 0, 96), known)


def test_pages_hold_pairs_as_the_header_says(library: Library) -> None:
    config = Config(num_layers=2, num_heads=2, num_kv_heads=2, head_dim=20, block_size=32, max_len=64)
    with NativeModel(library, config, random_weights(config, 1), num_blocks=3) as native:
        frame = np.arange(2 * 2 * 64 * 2 * 20, dtype=np.uint16).reshape(2, 2, 64, 2, 20)
        table = np.array([2, 0], np.int32)
        native.transfer("kvf_scatter", whole_piece(config, 0, 64), table, frame)
        pages = native.cache.view(np.uint16).reshape(2, 3, 2, 2, 2, 512)  # layer, block, page, head, K or V
        for layer, position, head in ((0, 0, 0), (1, 37, 1), (1, 63, 0), (0, 16, 1)):
            page = pages[layer, table[position // 32], position % 32 // 16, head]
            keys: Words = page[0].reshape(16, 16, 2)[:10, position % 16].reshape(-1)
            values: Words = page[1].reshape(8, 32, 2)[position % 16 // 2, :20, position % 2]
            assert np.array_equal(keys, frame[layer, 0, position, head])
            assert np.array_equal(values, frame[layer, 1, position, head])


def test_pieces_outside_the_cache_are_refused(library: Library) -> None:
    config = Config(max_len=64)
    with NativeModel(library, config, random_weights(config, 1), num_blocks=4) as native:
        table = np.arange(4, dtype=np.int32)
        for piece, match in (
            (Piece(0, 3, 0, 8, 0, 1), "argument"), (Piece(0, 2, 0, 8, 0, 2), "argument"),
            (Piece(0, 2, 0, 65, 0, 1), "positions"), (Piece(0, 2, 8, 8, 0, 1), "without content"),
            (Piece(0, 2, 9, 8, 0, 1), "positions"), (Piece(-1, 2, 0, 8, 0, 1), "argument"),
        ):  # fmt: skip
            for name in ("kvf_gather", "kvf_scatter"):
                with pytest.raises(RuntimeError, match=match):
                    native.transfer(name, piece, table, np.zeros(1 << 12, np.uint16))
        with pytest.raises(RuntimeError, match="fit"):
            native.transfer("kvf_gather", Piece(0, 2, 0, 8, 0, 1), table, np.zeros(9, np.uint16))
        with pytest.raises(RuntimeError, match="block outside"):
            native.transfer("kvf_gather", Piece(0, 1, 0, 8, 0, 1), table + 4, np.zeros((2, 8, 16), np.uint16))


def test_parts_that_differ_in_more_than_their_heads_are_refused(library: Library) -> None:
    config = Config(max_len=64)
    with NativeModel(library, config, random_weights(config, 1), num_blocks=4) as native:
        table, frame = np.arange(4, dtype=np.int32), np.zeros((2, 8, 16), np.uint16)
        own, later = Piece(0, 1, 0, 8, 0, 1), Piece(0, 1, 8, 16, 0, 1)
        caches = (Cache * 2)(native.blocks, native.blocks)
        where = (table.ctypes.data, len(table), frame.ctypes.data, frame.nbytes)
        for function in (library.c.kvf_gather, library.c.kvf_scatter):
            library.call(function, caches, (Piece * 2)(own, own), 2, *where)
            with pytest.raises(RuntimeError, match="fit"):
                library.call(function, caches, (Piece * 2)(own, later), 2, *where)
            with pytest.raises(RuntimeError, match="argument"):
                library.call(function, caches, (Piece * 2)(own, own), 0, *where)


def test_pieces_move_beside_a_running_step(library: Library) -> None:
    config = SHAPES["llama"]
    weights, tokens = random_weights(config, 1), random_tokens(config)
    with NativeModel(library, config, weights, threads=2) as native:
        table, still, moving = (np.arange(i, i + 13, dtype=np.int32) for i in (0, 20, 40))
        (expected,) = native.step(Rows(tokens, 0, table))
        native.step(Rows(tokens, 0, still, Wanted.NONE))
        frame = native.frame(still, 3, 199)
        with ThreadPoolExecutor(1) as pool:
            steps = pool.submit(lambda: [bits(native.step(Rows(tokens, 0, table))[0]) for _ in range(4)])
            for _ in range(20):
                assert np.array_equal(native.frame(still, 3, 199), frame)
                native.transfer("kvf_scatter", whole_piece(config, 3, 199), moving, frame)
            assert set(steps.result()) == {bits(expected)}
        assert np.array_equal(native.frame(moving, 3, 199), frame)


def test_scratch_memory_follows_the_largest_step(library: Library) -> None:
    config = Config()
    with NativeModel(library, config, random_weights(config, 1)) as native:
        size = library.c.kvf_model_workspace_bytes
        table, sizes = np.arange(8, dtype=np.int32), []
        for count in (1, 100, 7, 100):
            native.step(Rows(random_tokens(config, count), 0, table, Wanted.LAST))
            sizes.append(size(native.handle))
        assert sizes[0] < sizes[1] == sizes[2] == sizes[3] < sizes[0] + 100 * 2048


def test_64_sequences_in_one_step_are_those_64_alone(best_library: Library) -> None:
    config = replace(SHAPES["llama"], max_len=512)
    lengths = np.random.default_rng(3).integers(1, 60, 64)
    order = np.random.default_rng(4).permutation(64 * 4).astype(np.int32)
    prompts = [random_tokens(config, int(length), seed) for seed, length in enumerate(lengths)]
    # Half of them prefill, the others take one more token.
    starts = [0 if index % 2 else len(prompt) - 1 for index, prompt in enumerate(prompts)]
    with NativeModel(best_library, config, random_weights(config, 1), threads=2, num_blocks=256) as native:
        tables = [order[4 * index : 4 * index + 4] for index in range(64)]
        alone = []
        for prompt, start, table in zip(prompts, starts, tables, strict=True):
            if start:
                native.step(Rows(prompt[:start], 0, table, Wanted.NONE))
            alone.append(native.step(Rows(prompt[start:], start, table))[0])
        together = native.step(
            *(Rows(prompt[start:], start, table) for prompt, start, table in zip(prompts, starts, tables, strict=True))
        )
    assert [bits(each) for each in together] == [bits(each) for each in alone]


@pytest.mark.parametrize("quantization", [0, 1])
def test_the_end_of_a_context_of_32k_agrees_with_fp64(best_library: Library, quantization: int) -> None:
    length = 32768
    config = Config(num_layers=1, num_heads=2, head_dim=16, max_len=length, quantization=quantization)
    tokens = random_tokens(config, length)
    table = np.random.default_rng(0).permutation(length // 16).astype(np.int32)
    with NativeModel(best_library, config, random_weights(config, 1), threads=2, num_blocks=length // 16) as native:
        for start in range(0, length - 64, 4096):
            native.step(Rows(tokens[start : min(start + 4096, length - 64)], start, table, Wanted.NONE))
        (chunk,) = native.step(Rows(tokens[-64:], length - 64, table))
        (single,) = native.step(Rows(tokens[-1:], length - 1, table))
        with pytest.raises(RuntimeError, match="positions beyond"):
            native.step(Rows(tokens[-1:], length, np.append(table, table[:1])))
        workspace = best_library.c.kvf_model_workspace_bytes(native.handle)
        reference = Reference(config, native.weights).logits(tokens, last=8)
    assert bits(single) == bits(chunk[-1:])
    assert error_share(chunk[-8:], reference) < (0.035 if quantization else 0.02)
    assert workspace < 8 << 20  # rows of a step, not of the context


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("quantization", [0, 1])
def test_a_tied_head_is_the_only_copy_of_the_embedding(best_library: Library, quantization: int) -> None:
    config = Config(num_layers=1, vocab_size=30_000, hidden_size=512, quantization=quantization)
    weights = random_weights(config, 1)
    embedding = config.vocab_size * config.hidden_size * (1 if quantization else 2)  # bytes
    before = resident_bytes()
    with NativeModel(best_library, config, weights) as native:
        grown = resident_bytes() - before
        held = best_library.c.kvf_model_weight_bytes(native.handle)
    assert embedding <= held < 1.1 * embedding
    assert grown < 1.5 * embedding
    untied = {**weights, (Weight.HEAD, 0): weights[Weight.EMBEDDING, 0]}
    with NativeModel(best_library, replace(config, tied=0), untied) as native:
        two = best_library.c.kvf_model_weight_bytes(native.handle)
    assert two == held + config.vocab_size * config.hidden_size * 2  # looked up in bf16


EDGE = 1 << 16  # KVF_MAX_WIDTH
WIDEST = {
    "hidden": Config(num_layers=1, hidden_size=EDGE, intermediate_size=16, num_heads=1, vocab_size=5, tied=0),
    "intermediate": Config(num_layers=1, hidden_size=32, intermediate_size=EDGE, vocab_size=5),
    "heads": Config(num_layers=1, hidden_size=32, num_heads=EDGE // 512, head_dim=512, vocab_size=5),
}


@pytest.mark.parametrize("quantization", [0, 1])
@pytest.mark.parametrize("name", WIDEST)
def test_the_widest_layers_agree_with_fp64(best_library: Library, name: str, quantization: int) -> None:
    config = replace(WIDEST[name], quantization=quantization)
    weights, tokens = random_weights(config, 1), random_tokens(config, 9)
    with NativeModel(best_library, config, weights, threads=2, num_blocks=1) as native:
        (logits,) = native.step(Rows(tokens, 0, np.zeros(1, np.int32)))
    assert error_share(logits, Reference(config, weights).logits(tokens)) < (0.035 if quantization else 0.02)


@pytest.mark.skipif(shutil.which("clang++") is None, reason="there is no clang++")
def test_clang_builds_a_library_of_the_same_bits(best_library: Library, compiled: Compiled) -> None:
    other = Library(compiled.library(product(ISAS[0]), compiler="clang++"))
    for name in ("llama", "all biases, 1:1", "8:1, head size 96, odd sizes", "windows", "int8"):
        config, tokens, table = SHAPES[name], random_tokens(SHAPES[name]), shuffled_table(SHAPES[name])
        weights, found = random_weights(config, 1), []
        for library in (best_library, other):
            with NativeModel(library, config, weights, threads=2) as native:
                (logits,) = native.step(Rows(tokens, 0, table))
                found.append((bits(logits), native.frame(table, 0, LENGTH).tobytes()))
        assert found[0] == found[1], name


def test_a_record_of_a_sequence_has_the_size_that_c_gives_it() -> None:
    assert np.dtype(SEQUENCE).itemsize == 32


def test_sanitizers_find_nothing_in_random_steps_but_a_planted_overrun(compiled: Compiled) -> None:
    sources = (*LIBRARY, HERE / "step_random.cpp")
    assert run([compiled.program(SANITIZED, sources)]) == "25 models\n"
    planted = compiled.program(SANITIZED, sources, own={"step_random.cpp": ("-DKVF_PLANT_OVERRUN",)})
    assert "AddressSanitizer: heap-buffer-overflow" in run([planted], fails=True)


def test_ranks_on_threads_have_the_bits_of_one_and_no_race_unless_they_do_not_wait(compiled: Compiled) -> None:
    sources = (*LIBRARY, HERE / "ranks_races.cpp")
    assert run([compiled.program(RACES, sources)]) == "12 models\n"
    planted = compiled.program(RACES, sources, own={"group.cpp": ("-DKVF_SKIP_BARRIER",)})
    assert "ThreadSanitizer: data race" in run([planted], fails=True)
