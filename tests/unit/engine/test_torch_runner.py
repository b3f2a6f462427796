"""The torch runner: isolation of blocks, hand-off of KV between pools, identity, settings, sampling in steps."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, build, edit_config

from kvferry.engine.settings import EngineSettings
from kvferry.engine.torch.runner import TorchRunner
from kvferry.errors import SettingError
from kvferry.schedule.step import Draw, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling

TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, 90).astype(np.uint32)
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPES[0], tmp_path_factory.mktemp("checkpoint"), dtype=torch.bfloat16)


def runner_of(checkpoint: Path, **settings: object) -> TorchRunner:
    return TorchRunner(EngineSettings(checkpoint, **{"num_blocks": 24, "threads": 1, **settings}))  # type: ignore[arg-type]


def whole(runner: TorchRunner, start: int, end: int) -> Piece:
    return Piece(0, runner.kv_format.num_layers, start, end, 0, runner.kv_format.num_kv_heads)


def poison(runner: TorchRunner) -> None:
    """NaN in every slot of the pool."""
    for layer in runner._caches[0].layers:
        layer[:, : runner.num_blocks * runner.kv_format.block_size] = torch.nan


def decode_plan(table_a: np.ndarray, table_b: np.ndarray) -> StepPlan:
    """Contexts of 61 and 40: one group, padded."""
    return StepPlan((SequenceStep(0, TOKENS[60:61], 60, table_a), SequenceStep(1, TOKENS[39:40], 39, table_b)))


def test_poisoned_blocks_never_leak_into_a_row(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    blocks = np.random.default_rng(1).permutation(24).astype(np.int32)
    table_a, table_b = blocks[:6], blocks[6:12]
    prefill = StepPlan((SequenceStep(0, TOKENS[:60], 0, table_a), SequenceStep(1, TOKENS[:39], 0, table_b)))
    clean = runner.logits(prefill) + runner.logits(decode_plan(table_a, table_b))
    # Every slot is NaN when the sequences start: the tails of their last blocks, too.
    poison(runner)
    dirty = runner.logits(prefill) + runner.logits(decode_plan(table_a, table_b))
    assert all(np.array_equal(a, b) for a, b in zip(clean, dirty, strict=True))
    # Negative control: one NaN inside the context does show.
    for layer in runner._caches[0].layers:
        layer[0, int(table_a[0]) * 16] = torch.nan
    assert np.isnan(runner.logits(decode_plan(table_a, table_b))[0]).any()


def test_warm_up_touches_no_block_of_the_pool(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    for layer in runner._caches[0].layers:
        layer[:, : runner.num_blocks * 16] = 7
    runner.warm_up()
    null = slice(runner.num_blocks * 16, (runner.num_blocks + 1) * 16)
    for layer in runner._caches[0].layers:
        assert (layer[:, : runner.num_blocks * 16] == 7).all()
        assert (layer[:, null] == 0).all()


def test_kv_moved_to_another_pool_gives_identical_logits(checkpoint: Path) -> None:
    source, target = runner_of(checkpoint), runner_of(checkpoint, num_blocks=9)
    source_table = np.asarray([20, 3, 11, 7], np.int32)
    target_table = np.asarray([8, 0, 5, 2], np.int32)
    source.execute(StepPlan((SequenceStep(0, TOKENS[:50], 0, source_table),)))
    # Pieces cut by layers, tokens (off block borders) and heads.
    for layers in ((0, 2), (2, 3)):
        for tokens in ((0, 19), (19, 50)):
            for heads in ((0, 1), (1, 3)):
                piece = Piece(*layers, *tokens, *heads)
                slot = memoryview(bytearray(piece.num_bytes(64, "bfloat16")))
                source.gather(piece, source_table, slot)
                target.scatter(piece, target_table, slot)
    here = source.logits(StepPlan((SequenceStep(0, TOKENS[50:51], 50, source_table),)))[0]
    there = target.logits(StepPlan((SequenceStep(0, TOKENS[50:51], 50, target_table),)))[0]
    assert np.array_equal(here, there)
    # Negative control: one token's KV in the wrong place.
    piece = whole(source, 7, 8)
    slot = memoryview(bytearray(piece.num_bytes(64, "bfloat16")))
    source.gather(piece, source_table, slot)
    target.scatter(whole(source, 8, 9), target_table, slot)
    moved = target.logits(StepPlan((SequenceStep(0, TOKENS[50:51], 50, target_table),)))[0]
    assert not np.array_equal(here, moved)


def test_a_frame_is_layers_kinds_tokens_heads_dims(checkpoint: Path) -> None:
    runner = runner_of(checkpoint, dtype="float32")
    table = np.asarray([4, 9], np.int32)
    for index, layer in enumerate(runner._caches[0].layers):
        layer.copy_(torch.arange(layer.numel(), dtype=torch.float32).view_as(layer) + 1000 * index)
    piece = Piece(1, 3, 14, 18, 1, 3)
    slot = bytearray(piece.num_bytes(64, "float32"))
    runner.gather(piece, table, memoryview(slot))
    frame = np.frombuffer(slot, np.float32).reshape(2, 2, 4, 2, 64)
    slots = [4 * 16 + 14, 4 * 16 + 15, 9 * 16, 9 * 16 + 1]
    for layer in range(2):
        for kind in range(2):
            for token in range(4):
                for head in range(2):
                    expected = runner._caches[0].layers[layer + 1][kind * 3 + head + 1, slots[token]].numpy()
                    assert np.array_equal(frame[layer, kind, token, head], expected)


def test_gather_and_scatter_run_beside_steps_on_another_thread(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    still, busy = np.arange(4, dtype=np.int32), np.arange(4, 10, dtype=np.int32)
    runner.execute(StepPlan((SequenceStep(0, TOKENS[:50], 0, still),)))
    piece = whole(runner, 0, 50)
    expected = bytearray(piece.num_bytes(64, "bfloat16"))
    runner.gather(piece, still, memoryview(expected))
    alone = runner.logits(StepPlan((SequenceStep(1, TOKENS, 0, busy),)))[0]
    stop = threading.Event()
    wrong: list[int] = []
    rounds = 0

    def move() -> None:
        nonlocal rounds
        elsewhere = np.arange(12, 16, dtype=np.int32)
        slot = bytearray(len(expected))
        while not stop.is_set() or rounds == 0:
            runner.scatter(piece, elsewhere, memoryview(expected))
            runner.gather(piece, elsewhere, memoryview(slot))
            rounds += 1
            if slot != expected:
                wrong.append(rounds)

    mover = threading.Thread(target=move)
    mover.start()
    beside = [runner.logits(StepPlan((SequenceStep(1, TOKENS, 0, busy),)))[0] for _ in range(20)]
    stop.set()
    mover.join()
    assert not wrong
    assert all(np.array_equal(alone, logits) for logits in beside)


def test_tokens_come_in_plan_order_and_only_where_asked(checkpoint: Path) -> None:
    runner = runner_of(checkpoint)
    tables = np.arange(18, dtype=np.int32).reshape(3, 6)
    plan = StepPlan(
        (
            SequenceStep(0, TOKENS[:20], 0, tables[0], Draw(GREEDY, 0, 0)),
            SequenceStep(1, TOKENS[:33], 0, tables[1]),
            SequenceStep(2, TOKENS[5:6], 0, tables[2], Draw(GREEDY, 0, 0)),
        )
    )
    expected = [int(logits[-1].argmax()) for logits in runner.logits(plan)]
    result = runner.execute(plan)
    assert result.tokens == (expected[0], None, expected[2])
    assert result.seconds > 0


def test_equal_weights_share_a_format_and_other_weights_do_not(checkpoint: Path, tmp_path: Path) -> None:
    same = runner_of(checkpoint).kv_format.format_id
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    assert runner_of(copy).kv_format.format_id == same
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-3] ^= 1  # one bit of one weight
    (copy / "model.safetensors").write_bytes(content)
    others = [
        runner_of(copy),
        runner_of(checkpoint, dtype="float32"),
        runner_of(checkpoint, block_size=8),
    ]
    edit_config(Path(shutil.copytree(checkpoint, tmp_path / "rope")), rope_parameters={"rope_theta": 5e5})
    others.append(runner_of(tmp_path / "rope"))
    ids = [same, *(runner.kv_format.format_id for runner in others)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("device", "tpu"), ("device", "meta"), ("dtype", "int8"), ("num_blocks", 0), ("kv_cache_bytes", 10),
        ("block_size", 0), ("max_model_len", 0), ("max_model_len", 10_000), ("threads", 0),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_named(checkpoint: Path, setting: str, value: object) -> None:
    settings = {"num_blocks": None, setting: value}
    with pytest.raises(SettingError) as error:
        runner_of(checkpoint, **settings)
    assert error.value.setting == setting


def test_memory_budget_sets_the_number_of_blocks(checkpoint: Path) -> None:
    runner = runner_of(checkpoint, num_blocks=None, kv_cache_bytes=1 << 20)
    assert runner.num_blocks == (1 << 20) // (runner.kv_format.token_bytes * 16)


def test_loading_reports_progress_up_to_the_end(checkpoint: Path) -> None:
    shares: list[float] = []
    TorchRunner(EngineSettings(checkpoint, num_blocks=4), shares.append)
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
