"""Loading: single file and shards, and every way in which a checkpoint can be broken."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, build, edit_config
from runners import Runner, runner_of
from safetensors.torch import load_file, save_file

from kvferry.engine.settings import EngineSettings
from kvferry.errors import CheckpointError
from kvferry.schedule.step import SequenceStep, StepPlan

SHAPE = SHAPES[1]  # untied, biases
ENGINES = ("torch", "native")
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
Break = Callable[[Path], str]  # breaks a directory; returns what the error must name


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPE, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SHAPE, tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


def load(directory: Path, engine: str = "torch") -> Runner:
    return runner_of(engine, EngineSettings(directory, dtype="bfloat16", num_blocks=8, threads=1))


@pytest.mark.parametrize("engine", ENGINES)
def test_shards_load_as_the_single_file_does(whole: Path, sharded: Path, engine: str) -> None:
    assert len(list(sharded.glob("*.safetensors"))) > 2
    plan = StepPlan((SequenceStep(0, np.arange(20, dtype=np.uint32), 0, np.arange(2, dtype=np.int32)),))
    assert np.array_equal(load(whole, engine).logits(plan)[0], load(sharded, engine).logits(plan)[0])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loaded_model_does_not_depend_on_its_files(whole: Path, tmp_path: Path, engine: str) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    runner = load(copy, engine)
    plan = StepPlan((SequenceStep(0, np.arange(20, dtype=np.uint32), 0, np.arange(2, dtype=np.int32)),))
    before = runner.logits(plan)[0]
    with (copy / WEIGHTS).open("r+b") as file:
        file.seek(4096)
        file.write(bytes(100_000))  # in place: a mapped file would show it
    assert np.array_equal(runner.logits(plan)[0], before)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    # Clones: the loaded tensors are mapped from the file that is written next.
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, directory / WEIGHTS)


def missing_tensor(directory: Path) -> str:
    rewrite(directory, lambda tensors: tensors.__delitem__(NAME))
    return NAME


def wrong_shape(directory: Path) -> str:
    rewrite(directory, lambda tensors: tensors.update({NAME: tensors[NAME].T.contiguous()}))
    return NAME


def wrong_dtype(directory: Path) -> str:
    rewrite(directory, lambda tensors: tensors.update({NAME: tensors[NAME].to(torch.int8)}))
    return NAME


def truncated(directory: Path) -> str:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-100])
    return WEIGHTS


def cut_in_the_header(directory: Path) -> str:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:200])
    return WEIGHTS


def empty(directory: Path) -> str:
    (directory / WEIGHTS).write_bytes(b"")
    return WEIGHTS


def pickled(directory: Path) -> str:
    buffer = io.BytesIO()
    torch.save(load_file(directory / WEIGHTS), buffer)
    (directory / WEIGHTS).write_bytes(buffer.getvalue())
    return WEIGHTS


def absurd_header_length(directory: Path) -> str:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[:8] = (1 << 60).to_bytes(8, "little")
    (directory / WEIGHTS).write_bytes(content)
    return WEIGHTS


def edit_header(directory: Path, change: Callable[[dict[str, Any]], None]) -> str:
    content = (directory / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    encoded = json.dumps(header).encode()
    (directory / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[end:])
    return WEIGHTS


def offsets_beyond_the_file(directory: Path) -> str:
    return edit_header(directory, lambda header: header[NAME].update(data_offsets=[1 << 40, (1 << 40) + 14336]))


def offsets_before_the_data(directory: Path) -> str:
    return edit_header(directory, lambda header: header[NAME].update(data_offsets=[-14336, 0]))


def offsets_of_another_size(directory: Path) -> str:
    def shorten(header: dict[str, Any]) -> None:
        header[NAME]["data_offsets"][1] -= 4

    return edit_header(directory, shorten)


def a_header_that_is_a_list(directory: Path) -> str:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes((8).to_bytes(8, "little") + b"[1, 2]  " + content)
    return WEIGHTS


def a_shape_of_words(directory: Path) -> str:
    return edit_header(directory, lambda header: header[NAME].update(shape=["many", "more"]))


def no_weights(directory: Path) -> str:
    (directory / WEIGHTS).unlink()
    return WEIGHTS


def other_config(directory: Path) -> str:
    edit_config(directory, num_hidden_layers=4)
    return "model.layers.3"


@pytest.mark.parametrize(
    "break_it",
    [
        missing_tensor,
        wrong_shape,
        wrong_dtype,
        truncated,
        cut_in_the_header,
        empty,
        pickled,
        absurd_header_length,
        offsets_beyond_the_file,
        offsets_before_the_data,
        offsets_of_another_size,
        a_header_that_is_a_list,
        a_shape_of_words,
        no_weights,
        other_config,
    ],
)
def test_a_broken_checkpoint_is_refused_by_name(whole: Path, tmp_path: Path, break_it: Break) -> None:
    directory = Path(shutil.copytree(whole, tmp_path / "broken"))
    name = break_it(directory)
    for engine in ENGINES:
        with pytest.raises(CheckpointError) as error:
            load(directory, engine)
        assert name in str(error.value)
        assert str(directory) in error.value.path


def index_of(directory: Path) -> dict[str, dict[str, str]]:
    index: dict[str, dict[str, str]] = json.loads((directory / INDEX).read_text())
    return index


def missing_shard(directory: Path) -> str:
    name = index_of(directory)["weight_map"][NAME]
    (directory / name).unlink()
    return name


def tensor_in_another_shard(directory: Path) -> str:
    index = index_of(directory)
    places = index["weight_map"]
    places[NAME] = next(name for name in places.values() if name != places[NAME])
    (directory / INDEX).write_text(json.dumps(index))
    return NAME


def path_out_of_the_directory(directory: Path) -> str:
    index = index_of(directory)
    index["weight_map"][NAME] = "../whole.safetensors"
    (directory / INDEX).write_text(json.dumps(index))
    return "../whole.safetensors"


def garbled_index(directory: Path) -> str:
    (directory / INDEX).write_text('{"weight_map": [1, 2]}')
    return "weight_map"


def mixed_types_in_the_index(directory: Path) -> str:
    index = index_of(directory)
    index["weight_map"][NAME] = 3  # type: ignore[assignment]
    (directory / INDEX).write_text(json.dumps(index))
    return "weight_map"


@pytest.mark.parametrize(
    "break_it",
    [missing_shard, tensor_in_another_shard, path_out_of_the_directory, garbled_index, mixed_types_in_the_index],
)
def test_broken_shards_are_refused_by_name(sharded: Path, tmp_path: Path, break_it: Break) -> None:
    directory = Path(shutil.copytree(sharded, tmp_path / "broken"))
    name = break_it(directory)
    with pytest.raises(CheckpointError) as error:
        load(directory)
    assert name in str(error.value)


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load(tmp_path / "nowhere")
