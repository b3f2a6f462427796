"""A model over several ranks: the bits of one rank (native), transformers' logits (torch), memory, what goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import SHAPES, VOCAB_SIZE, Shape, build, reference_logits
from ranked import ranked
from runners import NATIVE, Runner, runner_of

from kvferry.engine.config import ModelConfig
from kvferry.engine.native.weights import parts
from kvferry.engine.ranks.shard import shards_of
from kvferry.engine.settings import EngineSettings
from kvferry.errors import SettingError
from kvferry.schedule.step import Draw, Score, SequenceStep, StepPlan
from kvferry.wire.frame import Piece
from kvferry.wire.sampling import Sampling

NUM_BLOCKS = 32
LENGTH = 100
TOKENS = np.random.default_rng(5).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)
OTHER = np.random.default_rng(6).integers(0, VOCAB_SIZE, LENGTH).astype(np.uint32)
ORDER = np.random.default_rng(7).permutation(NUM_BLOCKS).astype(np.int32)
TABLE, SECOND = ORDER[:7], ORDER[7:14]
UNEVEN = SHAPES[0]  # 9 query heads, 3 KV heads
ENGINES = ("native", "torch")
FP32_LIMIT = 2e-4  # of the torch engine against transformers: sums in another order
Tokens = npt.NDArray[np.uint32]
Table = npt.NDArray[np.int32]


def sizes_of(shape: Shape) -> list[int]:
    return [size for size in (2, 3, 4, 8) if size <= shape.num_heads]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {shape.name: build(shape, folder / shape.name) for shape in SHAPES}


def settings_of(checkpoint: Path, **fields: object) -> EngineSettings:
    wanted = {"dtype": "bfloat16", "num_blocks": NUM_BLOCKS, "threads": 1, **fields}
    return EngineSettings(checkpoint, **wanted)  # type: ignore[arg-type]


def plan(*parts: tuple[Tokens, int, int, Table]) -> StepPlan:
    return StepPlan(tuple(SequenceStep(0, text[start:end], start, table) for text, start, end, table in parts))


def journey(runner: Runner) -> list[npt.NDArray[np.float32]]:
    """Logits of TOKENS' positions 0 to 94 and of some of OTHER's: a prefill in chunks, a step that wants no logits, two
    sequences that decode together."""
    found = [runner.logits(plan((TOKENS, 0, 37, TABLE)))[0]]
    found += runner.logits(plan((OTHER, 0, 5, SECOND), (TOKENS, 37, 90, TABLE)))
    runner.execute(plan((OTHER, 5, 60, SECOND)))
    for at in range(5):
        found += runner.logits(plan((TOKENS, 90 + at, 91 + at, TABLE), (OTHER, 60 + at, 61 + at, SECOND)))
    return found


def kv_of(runner: Runner, table: Table, end: int, heads: range | None = None) -> bytes:
    kv = runner.kv_format
    heads = heads or range(kv.num_kv_heads)
    piece = Piece(0, kv.num_layers, 0, end, heads.start, heads.stop)
    content = bytearray(piece.num_bytes(kv.head_dim, kv.dtype))
    runner.gather(piece, table, memoryview(content))
    return bytes(content)


@dataclass
class Single:
    """A checkpoint, and what one rank makes of it."""

    shape: Shape
    checkpoint: Path
    engine: str
    settings: EngineSettings
    runner: Runner


@pytest.fixture(params=[(shape, engine) for shape in SHAPES for engine in ENGINES], ids=lambda p: f"{p[0].name}-{p[1]}")
def single(request: pytest.FixtureRequest, checkpoints: dict[str, Path]) -> Iterator[Single]:
    shape, engine = request.param
    checkpoint = checkpoints[shape.name]
    settings = settings_of(checkpoint, dtype="float32" if engine == "torch" else "bfloat16")
    runner = runner_of(engine, settings)
    yield Single(shape, checkpoint, engine, settings, runner)
    runner.close()


def test_every_family_at_every_degree(single: Single) -> None:
    """Native: logits and KV have the bits of one rank. Torch, in fp32: they are transformers', as one rank's are."""
    expected = journey(single.runner)
    kv, second = kv_of(single.runner, TABLE, 95), kv_of(single.runner, SECOND, 65)
    for size in sizes_of(single.shape):
        with ranked(single.engine, single.settings, size) as runner:
            assert runner.kv_format == single.runner.kv_format
            found = journey(runner)
            if single.engine == "native":
                assert runner.numerics_id == single.runner.numerics_id
                assert all(np.array_equal(*pair) for pair in zip(found, expected, strict=True)), f"{size} ranks"
                assert (kv_of(runner, TABLE, 95), kv_of(runner, SECOND, 65)) == (kv, second)
            else:
                assert runner.numerics_id == f"{single.runner.numerics_id}-tp{size}"
                wanted = reference_logits(single.checkpoint, TOKENS[:95].tolist(), torch.float32).numpy()
                own = np.concatenate([found[0], found[2], *found[3::2]])
                assert np.abs(own - wanted).max() <= FP32_LIMIT, f"{size} ranks"
                # Negative control: logits of another text are far off.
                assert np.abs(own[:5] - found[1]).max() > 1


@pytest.mark.parametrize("engine", NATIVE)
@pytest.mark.parametrize("fields", [{"threads": 2}, {"quantization": "int8"}], ids=["threads", "int8"])
def test_threads_instruction_sets_and_int8_keep_the_bits(
    checkpoints: dict[str, Path], engine: str, fields: dict[str, object]
) -> None:
    wanted = settings_of(checkpoints[UNEVEN.name], **fields)
    alone = runner_of(engine, wanted)
    with ranked(engine, wanted, 2) as runner:
        for found, expected in zip(journey(runner), journey(alone), strict=True):
            assert np.array_equal(found, expected)
    alone.close()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_bit_in_any_ranks_kv_shows(checkpoints: dict[str, Path], engine: str) -> None:
    """Negative control: what a comparison of logits would miss if a rank's part were not read."""
    with ranked(engine, settings_of(checkpoints[UNEVEN.name]), 2) as runner:
        kv, clean = runner.kv_format, journey(runner)
        for head in range(kv.num_kv_heads):
            journey(runner)
            piece = Piece(0, 1, 3, 4, head, head + 1)
            runner.scatter(piece, TABLE, memoryview(b"\x40\x41" * (piece.num_bytes(kv.head_dim, kv.dtype) // 2)))
            found = runner.logits(plan((TOKENS, 94, 95, TABLE)))[0]
            assert not np.array_equal(found, clean[-2]), head


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("here", "there"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 3), (1, 8), (8, 2)])
def test_kv_moves_between_any_two_degrees(checkpoints: dict[str, Path], engine: str, here: int, there: int) -> None:
    """In frames of all heads and of some, whatever each side's ranks have of them."""
    wanted = settings_of(checkpoints[UNEVEN.name])
    with ranked(engine, wanted, here) as source, ranked(engine, wanted, there) as target:
        source.logits(plan((TOKENS, 0, 60, TABLE)))
        kv = source.kv_format
        for heads in (range(kv.num_kv_heads), range(1), range(1, kv.num_kv_heads)):
            content = kv_of(source, TABLE, 60, heads)
            piece = Piece(0, kv.num_layers, 0, 60, heads.start, heads.stop)
            target.scatter(piece, SECOND, memoryview(content))
            assert kv_of(target, SECOND, 60, heads) == content
        expected = source.logits(plan((TOKENS, 60, 61, TABLE)))[0]
        found = target.logits(plan((TOKENS, 60, 61, SECOND)))[0]
        assert np.abs(found - expected).max() <= (0 if engine == "native" else 0.15)


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_and_scores_are_the_leaders_alone(checkpoints: dict[str, Path], engine: str) -> None:
    wanted = settings_of(checkpoints[UNEVEN.name])
    step = SequenceStep(0, TOKENS[:40], 0, TABLE, Draw(Sampling(temperature=0), 0, 0), Score(3, TOKENS[4:31], 2))
    plain = SequenceStep(1, OTHER[:9], 0, SECOND, Draw(Sampling(temperature=1.0, seed=7), 0, 0))
    results = []
    for size in (1, 2, 4, 8):
        with ranked(engine, wanted, size) as runner:
            runner.warm_up()
            results.append(runner.execute(StepPlan((plain, step))))
            assert runner.execute(StepPlan(())).tokens == ()
    for result in results[1:]:
        assert result.tokens == results[0].tokens
        found, expected = result.scores_of(1), results[0].scores_of(1)
        assert found is not None
        assert expected is not None
        assert np.abs(found.logprobs - expected.logprobs).max() <= (0 if engine == "native" else 0.15)


def test_a_copied_block_is_copied_in_every_rank(checkpoints: dict[str, Path]) -> None:
    with ranked("native", settings_of(checkpoints[UNEVEN.name]), 2) as runner:
        runner.execute(plan((TOKENS, 0, 40, TABLE)))
        runner.copy_blocks([(int(TABLE[2]), int(ORDER[30]))])  # type: ignore[union-attr]
        moved = np.asarray([*TABLE[:2], ORDER[30], *TABLE[3:]], np.int32)
        assert kv_of(runner, moved, 40) == kv_of(runner, TABLE, 40)


def test_a_rank_reads_only_its_part_of_the_weights(model_dir: Path) -> None:
    """Of the real model, in elements: at most 1/N, the norms, and the KV head by which an uneven split differs."""
    config = ModelConfig.read(model_dir)
    width, layers = config.hidden_size, config.num_layers

    def elements(size: int, rank: int) -> int:
        inputs = {"o_proj": config.num_heads * config.head_dim, "down_proj": config.intermediate_size}
        total = 0
        for part in parts(config, shards_of(config, size)[rank]):
            name = part.tensor.split(".")[-2]
            total += len(part.rows) * (1 if "norm" in name else inputs.get(name, width))
        return total

    whole = elements(1, 0)
    norms = (2 * layers + 1) * width
    kv_head = (config.queries_per_kv_head + 2) * config.head_dim * width * layers  # with its queries
    for size in (2, 3, 4, 8):
        held = [elements(size, rank) for rank in range(size)]
        assert max(held) <= whole / size + norms + kv_head
        repeated = max(size - config.num_kv_heads, 0) * 2 * config.head_dim * width * layers
        assert sum(held) == whole + (size - 1) * norms + repeated


@pytest.mark.parametrize("engine", ENGINES)
def test_memory_of_a_rank_falls_with_their_number(checkpoints: dict[str, Path], engine: str) -> None:
    wanted = settings_of(checkpoints["mistral-head128"])
    alone = runner_of(engine, wanted)
    with ranked(engine, wanted, 2) as runner:
        (whole,) = alone.rank_weight_bytes
        assert max(runner.rank_weight_bytes) <= 0.65 * whole  # tiny matrices, padded to whole panels
    alone.close()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_of_the_real_model_takes_its_part_of_the_memory(model_dir: Path, engine: str, size: int) -> None:
    """At most 1/N of one rank's, the norms, and the KV head by which an uneven split differs, as it is read."""
    wanted = settings_of(model_dir, max_model_len=64)
    alone = runner_of(engine, wanted)
    (whole,) = alone.rank_weight_bytes
    alone.close()
    config = ModelConfig.read(model_dir)
    norms = (2 * config.num_layers + 1) * config.hidden_size
    kv_head = (config.queries_per_kv_head + 2) * config.head_dim * config.hidden_size * config.num_layers
    with ranked(engine, wanted, size) as runner:
        assert len(runner.rank_weight_bytes) == size
        assert max(runner.rank_weight_bytes) <= whole / size + 2 * (norms + kv_head)  # 2 bytes of bf16
        assert sum(runner.rank_weight_bytes) >= whole


@pytest.mark.parametrize("engine", ENGINES)
def test_more_ranks_than_heads_are_refused_by_name(checkpoints: dict[str, Path], engine: str) -> None:
    with (
        pytest.raises(SettingError, match="1 to 9 ranks") as error,
        ranked(engine, settings_of(checkpoints[UNEVEN.name]), 10),
    ):
        pass
    assert error.value.setting == "tensor_parallel_size"
