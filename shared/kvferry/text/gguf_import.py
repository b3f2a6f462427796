"""A llama-architecture GGUF file made into a Hugging Face model directory, once.

Weights go from their stored blocks to bfloat16 in slabs of bounded size, so memory does not grow with the
model. The directory is written beside its destination and renamed into place when all of it is on disk.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvferry.errors import CheckpointError
from kvferry.text.dequantize import to_bfloat16
from kvferry.text.gguf import GgufFile, GgufTensor
from kvferry.text.gguf_config import GgufConfig
from kvferry.text.gguf_tokenizer import GgufTokenizer
from kvferry.text.safetensors_file import SafetensorsWriter, TensorSpec

MAX_SLAB_VALUES: Final = 4 << 20  # 16 MiB as float32, beside about as much again in temporaries

# (what is being done, bytes done, bytes in all)
Progress = Callable[[str, int, int], None]


def import_gguf(source: str | os.PathLike[str], destination: str | os.PathLike[str], progress: Progress) -> Path:
    """Import `source` into the new directory `destination`, and return its path.

    Raises `CheckpointError` for a file that cannot be imported and for a destination that exists, `OSError`
    when the disk fails or is full. Whatever happens, `destination` is complete or absent.
    """
    target = Path(destination).expanduser()
    if target.exists():
        raise CheckpointError(str(target), "exists already")
    with GgufFile(Path(source).expanduser()) as file:
        config = GgufConfig(file)
        tokenizer = GgufTokenizer(config)
        plan = _plan(file, config)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=partial_prefix(target), dir=target.parent))
        try:
            _write_weights(partial / "model.safetensors", file, config, plan, progress)
            _write(partial / "tokenizer.json", tokenizer.tokenizer_json())
            _write_json(partial / "tokenizer_config.json", tokenizer.tokenizer_config())
            special = {
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_ids,
                "pad_token_id": tokenizer.pad_token_id,
            }
            special = {name: value for name, value in special.items() if value not in (None, [])}
            _write_json(partial / "generation_config.json", special)
            _write_json(partial / "config.json", {**config.hugging_face(), **special})
            partial.chmod(0o755)
            _sync_directory(partial)
            os.rename(partial, target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        _sync_directory(target.parent)
    return target


def partial_prefix(target: Path) -> str:
    """How the folders beside `target` that hold an unfinished import begin."""
    return f".{target.name}.import-"


def _plan(file: GgufFile, config: GgufConfig) -> dict[str, GgufTensor]:
    """Hugging Face name -> the GGUF tensor to write. Every tensor of the model and no other."""
    plan = {}
    wanted = config.tensors()
    for name, (source, shape) in wanted.items():
        tensor = file.tensors.get(source)
        if tensor is None:
            raise config.error(source, "missing")
        if tensor.shape != shape:
            raise config.error(source, f"shape {tensor.shape}, expected {shape}")
        if len(shape) == 1 and tensor.format.block_size > 1:
            raise config.error(source, f"a vector in {tensor.format.name}")
        plan[name] = tensor
    surplus = file.tensors.keys() - {source for source, _ in wanted.values()}
    if surplus:
        raise config.error(min(surplus), "not part of a llama model as kvferry runs it")
    return plan


def _write_weights(
    path: Path, file: GgufFile, config: GgufConfig, plan: dict[str, GgufTensor], progress: Progress
) -> None:
    total = sum(tensor.num_bytes for tensor in plan.values())
    done = 0
    with path.open("wb") as stream:
        writer = SafetensorsWriter(stream, {name: TensorSpec(tensor.shape) for name, tensor in plan.items()})
        for tensor in plan.values():
            rotated = ".attn_q." in tensor.name or ".attn_k." in tensor.name
            for values in _slabs(file, tensor, config.head_dim if rotated else None):
                writer.append(to_bfloat16(values))
            done += tensor.num_bytes
            progress("import", done, total)
        writer.finish()
        stream.flush()
        os.fsync(stream.fileno())


def _slabs(file: GgufFile, tensor: GgufTensor, head_dim: int | None) -> Iterator[npt.NDArray[np.float32]]:
    """A tensor's values in order, f32 [num_values], slab by slab. `head_dim`: un-permute each head's rows.

    llama.cpp rotates neighbouring rows (0, 1), (2, 3), … of a head, Hugging Face rows (0, d/2), (1, d/2 + 1),
    …, so its converter interleaves the two halves of every head of Q and K. This puts them back.
    """
    # The rows to permute: of a bias, each value is one.
    num_rows = tensor.shape[0]
    row_bytes = tensor.num_bytes // num_rows
    unit = head_dim or 1
    step = max(1, MAX_SLAB_VALUES * num_rows // tensor.num_values // unit) * unit
    for first in range(0, num_rows, step):
        count = min(step, num_rows - first)
        stored = np.frombuffer(file.read(tensor, first * row_bytes, count * row_bytes), np.uint8)
        if head_dim is not None:
            stored = stored.reshape(-1, head_dim // 2, 2, row_bytes).swapaxes(1, 2)
        yield tensor.format.dequantize(np.ascontiguousarray(stored))


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
