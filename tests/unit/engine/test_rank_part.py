"""What a rank reads of a checkpoint: its rows and what all ranks have, whatever loads them; and whether it can tell by
them alone that its leader has another model."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pytest
import torch
from checkpoints import SHAPES, Shape, build, edit_config
from ranked import ranked
from runners import native_library

from kvferry.engine.checkpoint import SINGLE_FILE, Shapes, expected_shapes
from kvferry.engine.config import ModelConfig
from kvferry.engine.native.follower import NativeFollower
from kvferry.engine.ranks.channel import SocketChannel
from kvferry.engine.ranks.followers import Exchange, Setup
from kvferry.engine.ranks.part import part_id
from kvferry.engine.ranks.shard import Shard, shards_of
from kvferry.engine.ranks.shared_memory import SharedMemory
from kvferry.engine.safetensors import SafetensorsFile, Stored, open_safetensors
from kvferry.engine.settings import EngineSettings, kv_format_of, weights_fingerprint
from kvferry.engine.torch.rank import TorchFollower
from kvferry.errors import CheckpointError
from kvferry.worker.rank_port import RankLink
from kvferry.worker.remote_rank import load
from kvferry.worker.settings import RankSettings

DTYPE = "bfloat16"
LOADERS = ("native", "torch", "remote")
SLACK = 0.05  # of all files' bytes: what a buffered file reads beyond what it is asked for, and config.json
Rows = dict[str, set[int]]  # of every tensor


def settings_of(checkpoint: Path, size: int, **fields: Any) -> EngineSettings:
    wanted = {"dtype": DTYPE, "num_blocks": 4, "threads": 1, "tensor_parallel_size": size, "max_model_len": 64}
    return EngineSettings(checkpoint, **{**wanted, **fields})


def rows_of(shard: Shard, config: ModelConfig) -> Rows:
    shapes = expected_shapes(config)
    return {name: set(shard.rows(name, config) or range(shape[0])) for name, shape in shapes.items()}


@pytest.fixture(params=[SHAPES[0], SHAPES[1], SHAPES[-1]], ids=lambda shape: shape.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shape: Shape = request.param
    return build(shape, tmp_path / shape.name, dtype=torch.bfloat16)


@pytest.fixture
def link() -> Iterator[RankLink]:
    """A rank's end of one over TCP, on which nothing is said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = [socket.create_connection(server.getsockname()) for _ in range(3)]
        accepted = [server.accept()[0] for _ in ends]
        link = RankLink(*map(SocketChannel, ends))
        yield link
        link.close()
        for end in accepted:
            end.close()


def setup_of(settings: EngineSettings, rank: int) -> Setup:
    """What the leader of a rank on another host tells it."""
    config = ModelConfig.read(settings.model_dir)
    told = part_id(settings, config, DTYPE, shards_of(config, settings.tensor_parallel_size)[rank])
    return Setup("torch", rank, settings.as_fields(), Exchange("127.0.0.1", 1), "id of its KV format", told)


def loader(kind: str, settings: EngineSettings, rank: int, link: RankLink) -> Callable[[], None]:
    """Loads one rank, as its process does, when it is called."""
    if kind == "remote":
        setup = setup_of(settings, rank)
        return lambda: load(setup, link, RankSettings()).follower.close()

    def local() -> None:
        memory = SharedMemory.create(settings.tensor_parallel_size)
        if kind == "native":
            NativeFollower(settings, rank, memory, native_library()).close()
        else:
            TorchFollower(settings, rank, memory).close()
        memory.close()

    return local


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """Rows of tensors that have been read."""
    found: Rows = {}
    original = SafetensorsFile.read

    def spy(file: SafetensorsFile, name: str, first_row: int = 0, end_row: int | None = None) -> npt.NDArray[Any]:
        array = original(file, name, first_row, end_row)
        found.setdefault(name, set()).update(range(first_row, first_row + len(array)))
        return array

    monkeypatch.setattr(SafetensorsFile, "read", spy)
    return found


@pytest.mark.parametrize("kind", LOADERS)
def test_every_rank_reads_its_rows_and_no_others(checkpoint: Path, kind: str, link: RankLink, read: Rows) -> None:
    config = ModelConfig.read(checkpoint)
    for size in (2, 4):
        for shard in shards_of(config, size):
            load_rank = loader(kind, settings_of(checkpoint, size), shard.rank, link)
            read.clear()
            load_rank()
            assert read == rows_of(shard, config), f"rank {shard.rank} of {size}"


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("size", [2, 4])
def test_a_ranks_process_reads_no_more_bytes_than_those_rows(
    model_dir: Path, kind: str, size: int, link: RankLink
) -> None:
    """Of the real model, by the kernel's count; a rank on another host reads its rows twice, to compare and to load."""
    config = ModelConfig.read(model_dir)
    whole = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    for shard in shards_of(config, size):
        load_rank = loader(kind, settings_of(model_dir, size), shard.rank, link)
        rows = rows_of(shard, config)
        with open_safetensors(model_dir / SINGLE_FILE) as file:
            own = sum(row_bytes(file.tensors[name]) * len(rows[name]) for name in rows)
        before = bytes_read()
        load_rank()
        taken = bytes_read() - before
        times = 2 if kind == "remote" else 1
        assert times * own <= taken <= times * own + SLACK * whole, f"rank {shard.rank} of {size}"
    # Negative control: the count sees a file that is read whole.
    before = bytes_read()
    weights_fingerprint(model_dir)
    assert bytes_read() - before >= whole


def row_bytes(stored: Stored) -> int:
    return (stored.end - stored.start) // stored.shape[0]


def bytes_read() -> int:
    """By this process so far, whatever they came from."""
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.parametrize("size", [2, 4])
def test_one_byte_of_a_row_changes_the_part_of_the_ranks_that_read_it_and_of_no_other(
    checkpoint: Path, size: int
) -> None:
    config = ModelConfig.read(checkpoint)
    settings, shards = settings_of(checkpoint, size), shards_of(config, size)

    def told() -> list[str]:
        return [part_id(settings, config, DTYPE, shard) for shard in shards]

    parts = told()
    assert len(set(parts)) == size
    with open_safetensors(checkpoint / SINGLE_FILE) as file:
        tensors = dict(file.tensors)
    shapes: Shapes = expected_shapes(config)
    for name in (each for each in shapes if ".layers." not in each or ".layers.1." in each):
        for row in (0, shapes[name][0] - 1):
            flip(checkpoint, tensors[name], row)
            changed = [now != before for now, before in zip(told(), parts, strict=True)]
            assert changed == [row in rows_of(shard, config)[name] for shard in shards], (name, row)
            flip(checkpoint, tensors[name], row)
    assert told() == parts


def flip(checkpoint: Path, stored: Stored, row: int) -> None:
    """A bit of a row's last byte."""
    with (checkpoint / SINGLE_FILE).open("r+b") as file:
        file.seek(stored.start + row_bytes(stored) * (row + 1) - 1)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def test_a_rank_on_another_host_takes_its_leaders_weights_and_no_others(
    checkpoint: Path, tmp_path: Path, link: RankLink
) -> None:
    """Under the same name; what it does not read may be anything, since nothing is computed from it."""
    config, settings = ModelConfig.read(checkpoint), settings_of(checkpoint, 2)
    setup = setup_of(settings, 1)
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    own = RankSettings(model_dir=str(copy))
    with open_safetensors(copy / SINGLE_FILE) as file:
        tensors = dict(file.tensors)
    rows = rows_of(shards_of(config, 2)[1], config)["model.layers.0.mlp.down_proj.weight"]

    def refused() -> None:
        with pytest.raises(CheckpointError, match="is not the leader's model"):
            load(setup, link, own)

    rank = load(setup, link, own)
    assert rank.limits.kv_format.format_id == "id of its KV format"
    rank.follower.close()
    down = tensors["model.layers.0.mlp.down_proj.weight"]
    flip(copy, down, min(rows))
    refused()
    flip(copy, down, min(rows))
    flip(copy, down, min(rows) - 1)  # the other rank's
    load(setup, link, own).follower.close()
    norm = tensors["model.norm.weight"]
    flip(copy, norm, 0)  # every rank has it
    refused()
    flip(copy, norm, 0)
    edit_config(copy, rms_norm_eps=0.25)  # the same weights, computed with otherwise
    refused()


def test_ranks_beside_their_leader_are_told_no_part_and_the_format_is_of_all_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have its files; and workers of any degree pair by the format."""
    monkeypatch.setattr("kvferry.engine.torch.leader.part_id", lambda *_: pytest.fail("read once more in vain"))
    settings = settings_of(checkpoint, 1)
    with ranked("torch", settings, 2) as runner:
        assert runner.kv_format == kv_format_of(settings, ModelConfig.read(checkpoint), DTYPE)
