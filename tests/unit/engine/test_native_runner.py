"""The native runner: identity, settings, blocks, copies, weights of other dtypes, hand-off with a torch worker."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, build, edit_config
from runners import NATIVE, native_library, runner_of

from kvferry.engine.native.runner import NativeRunner
from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.errors import SettingError
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling

TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 90).astype(np.uint32)
HEAD_DIM = 64


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16)


def native(checkpoint: Path, **settings: object) -> NativeRunner:
    wanted = EngineSettings(checkpoint, **{"num_blocks": 24, "threads": 1, **settings})  # type: ignore[arg-type]
    return NativeRunner(wanted, library=native_library(wanted.isa))


def whole(runner: NativeRunner | TorchRunner, end: int, start: int = 0) -> Piece:
    return Piece(0, runner.kv_format.num_layers, start, end, 0, runner.kv_format.num_kv_heads)


def kv_of(runner: NativeRunner | TorchRunner, table: np.ndarray, end: int) -> bytearray:
    piece = whole(runner, end)
    content = bytearray(piece.num_bytes(HEAD_DIM, "bfloat16"))
    runner.gather(piece, table, memoryview(content))
    return content


def last(runner: NativeRunner | TorchRunner, table: np.ndarray, position: int) -> np.ndarray:
    step = SequenceStep(0, TOKENS[position : position + 1], position, table)
    return runner.logits(StepPlan((step,)))[0][0]


def test_a_torch_and_a_native_worker_can_be_paired(checkpoint: Path) -> None:
    """Equal KV format, KV that either can go on from; bits of their own, and names that say so."""
    torch_runner = TorchRunner(EngineSettings(checkpoint, num_blocks=24, threads=1))
    runner = native(checkpoint)
    assert runner.kv_format == torch_runner.kv_format
    assert runner.numerics_id != torch_runner.numerics_id
    assert runner.exact
    here, there = np.asarray([20, 3, 11, 7], np.int32), np.asarray([8, 0, 5, 2], np.int32)
    prefill = StepPlan((SequenceStep(0, TOKENS[:50], 0, here),))
    for source, target in ((torch_runner, runner), (runner, torch_runner)):
        source.execute(prefill)
        content = kv_of(source, here, 50)
        target.scatter(whole(target, 50), there, memoryview(content))
        assert kv_of(target, there, 50) == content
        found, expected = last(target, there, 50), last(source, here, 50)
        assert np.abs(found - expected).max() <= 0.15
        # Negative control: the token before it gives other logits.
        assert np.abs(found - last(source, here, 49)).max() > 1.5


def test_what_bits_depend_on_is_in_the_numerics_id_and_threads_are_not(checkpoint: Path) -> None:
    ids = {name: runner_of(name, EngineSettings(checkpoint, num_blocks=8)).numerics_id for name in NATIVE}
    assert len(set(ids.values())) == len(NATIVE)
    assert all(name.removeprefix("native-") in numerics for name, numerics in ids.items())
    assert native(checkpoint, threads=1).numerics_id == native(checkpoint, threads=2).numerics_id
    assert native(checkpoint, quantization="int8").numerics_id != native(checkpoint).numerics_id


def test_int8_has_a_kv_format_of_its_own(checkpoint: Path) -> None:
    plain, quantized = native(checkpoint), native(checkpoint, quantization="int8")
    assert plain.kv_format.format_id != quantized.kv_format.format_id
    plan = StepPlan((SequenceStep(0, TOKENS, 0, np.arange(6, dtype=np.int32)),))
    difference = np.abs(plain.logits(plan)[0] - quantized.logits(plan)[0])
    assert 0 < difference.mean() < 0.1


@pytest.mark.parametrize("engine", NATIVE)
def test_bits_do_not_depend_on_threads_chunks_or_blocks(checkpoint: Path, engine: str) -> None:
    one = runner_of(engine, EngineSettings(checkpoint, num_blocks=24, threads=1))
    two = runner_of(engine, EngineSettings(checkpoint, num_blocks=24, threads=2))
    table, other = np.arange(6, dtype=np.int32), np.arange(23, 17, -1).astype(np.int32)
    expected = one.logits(StepPlan((SequenceStep(0, TOKENS, 0, table),)))[0]
    chunked = [
        two.logits(StepPlan((SequenceStep(0, TOKENS[at : at + 13], at, other),)))[0] for at in range(0, len(TOKENS), 13)
    ]
    assert np.array_equal(np.concatenate(chunked), expected)
    assert kv_of(two, other, len(TOKENS)) == kv_of(one, table, len(TOKENS))


def test_poisoned_blocks_never_leak_into_a_row(checkpoint: Path) -> None:
    runner = native(checkpoint)
    table = np.random.default_rng(1).permutation(24).astype(np.int32)[:6]
    plans = [
        StepPlan((SequenceStep(0, TOKENS[:60], 0, table),)),
        StepPlan((SequenceStep(0, TOKENS[60:61], 60, table),)),
    ]
    clean = [runner.logits(plan)[0] for plan in plans]
    for blocks in np.arange(24, dtype=np.int32).reshape(2, 12):
        content = kv_of(runner, blocks, 12 * 16)
        runner.scatter(whole(runner, 12 * 16), blocks, memoryview(b"\xff" * len(content)))  # NaN in bf16
    assert all(np.array_equal(runner.logits(plan)[0], rows) for plan, rows in zip(plans, clean, strict=True))
    # Negative control: one NaN inside the context does show.
    piece = whole(runner, 11, 10)
    runner.scatter(piece, table, memoryview(b"\xff" * piece.num_bytes(HEAD_DIM, "bfloat16")))
    assert np.isnan(runner.logits(plans[1])[0]).any()


def test_a_copied_block_continues_as_the_original(checkpoint: Path) -> None:
    runner = native(checkpoint)
    table, copy = np.asarray([3, 9, 1, 20], np.int32), np.asarray([3, 9, 1, 14], np.int32)
    runner.execute(StepPlan((SequenceStep(0, TOKENS[:55], 0, table),)))
    expected = last(runner, table, 55)
    runner.copy_blocks([(20, 14)])
    assert np.array_equal(last(runner, copy, 55), expected)
    runner.copy_blocks([])
    for pair in ((0, 24), (-1, 2)):
        with pytest.raises(RuntimeError, match="outside the pool"):
            runner.copy_blocks([pair])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_wider_checkpoints_are_rounded_as_torch_rounds_them(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    wide = build(SHAPES[1], tmp_path / "wide", dtype=dtype)
    rounded = Path(shutil.copytree(wide, tmp_path / "rounded"))
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(wide / "model.safetensors").items()}
    save_file(tensors, rounded / "model.safetensors")
    plan = StepPlan((SequenceStep(0, TOKENS, 0, np.arange(6, dtype=np.int32)),))
    found = native(wide, dtype="bfloat16").logits(plan)[0]
    assert np.array_equal(found, native(rounded, dtype="bfloat16").logits(plan)[0])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("device", "cuda"), ("dtype", "float32"), ("dtype", "int8"), ("num_blocks", 0), ("kv_cache_bytes", 10),
        ("block_size", 0), ("block_size", 24), ("max_model_len", 0), ("max_model_len", 10_000), ("threads", 0),
        ("quantization", "int4"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(checkpoint: Path, setting: str, value: object) -> None:
    settings = {"num_blocks": None, setting: value}
    with pytest.raises(SettingError) as error:
        native(checkpoint, **settings)
    assert error.value.setting == setting


def test_equal_weights_share_a_format_and_other_weights_do_not(checkpoint: Path, tmp_path: Path) -> None:
    same = native(checkpoint).kv_format.format_id
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    edit_config(changed, rope_parameters={"rope_theta": 5e5})
    assert len({same, native(changed).kv_format.format_id, native(checkpoint, block_size=32).kv_format.format_id}) == 3


def test_loading_reports_progress_up_to_the_end(checkpoint: Path) -> None:
    shares: list[float] = []
    NativeRunner(EngineSettings(checkpoint, num_blocks=4, threads=1), shares.append, native_library())
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_tables_of_another_dtype_are_refused(checkpoint: Path) -> None:
    runner = native(checkpoint)
    step = SequenceStep(0, TOKENS[:5], 0, np.zeros(1, np.int64), Draw(Sampling(temperature=0), 0, 0))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="int64"):
        runner.execute(StepPlan((step,)))


def test_a_closed_runner_gives_its_memory_back_and_may_be_closed_again(checkpoint: Path) -> None:
    runner = native(checkpoint)
    runner.close()
    runner.close()
    with pytest.raises(RuntimeError):
        runner.logits(StepPlan((SequenceStep(0, TOKENS[:5], 0, np.zeros(1, np.int32)),)))
