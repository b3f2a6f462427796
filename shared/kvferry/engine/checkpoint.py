"""Reads a model directory's safetensors files: finds them, checks every tensor, names what is wrong.

Nothing is used before the whole set of names and shapes has been checked, so a broken checkpoint fails in
milliseconds and not in mid-load.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from kvferry.engine.config import ModelConfig
from kvferry.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 64 << 20
MAX_HEADER_BYTES: Final = 64 << 20
MAX_FILES: Final = 4096
FLOAT_DTYPES: Final = ("BF16", "F16", "F32")

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Every tensor that a checkpoint of this model must have, in loading order."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}

    def linear(name: str, out: int, inside: int, bias: bool) -> None:
        shapes[f"{name}.weight"] = (out, inside)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, out in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            linear(f"{prefix}.self_attn.{name}", out, hidden, config.qkv_bias)
        if config.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (config.head_dim,)
        linear(f"{prefix}.self_attn.o_proj", hidden, queries, config.output_bias)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        for name in ("gate_proj", "up_proj"):
            linear(f"{prefix}.mlp.{name}", inner, hidden, config.mlp_bias)
        linear(f"{prefix}.mlp.down_proj", hidden, inner, config.mlp_bias)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


class Checkpoint:
    """The open, checked files of one model directory. Tensors are read one by one through the page cache."""

    def __init__(self, files: Mapping[str, Any], places: Mapping[str, str], directory: Path) -> None:
        self._files = files  # open safetensors files by name
        self._places = places  # tensor -> name of its file
        self._directory = directory

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor on the CPU in its stored dtype, backed by the mapped file: copy it before `close`."""
        file = self._places[name]
        try:
            value: torch.Tensor = self._files[file].get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(str(self._directory / file), f"{name}: {error}") from None
        return value

    def check(self, expected: Shapes) -> None:
        """Raises `CheckpointError` for a missing tensor, a wrong shape or a dtype that is no float."""
        for name, shape in expected.items():
            if name not in self._places:
                raise CheckpointError(str(self._directory), f"{name}: missing")
            file = self._places[name]
            try:
                entry = self._files[file].get_slice(name)
            except SafetensorError:
                problem = f"{name}: the index places it here, but the file lacks it"
                raise CheckpointError(str(self._directory / file), problem) from None
            found = tuple(entry.get_shape())
            if found != shape:
                problem = f"{name}: shape {list(found)}, expected {list(shape)}"
                raise CheckpointError(str(self._directory / file), problem)
            if entry.get_dtype() not in FLOAT_DTYPES:
                problem = f"{name}: dtype {entry.get_dtype()}, supported: {', '.join(FLOAT_DTYPES)}"
                raise CheckpointError(str(self._directory / file), problem)


@contextmanager
def open_checkpoint(directory: Path, expected: Shapes) -> Iterator[Checkpoint]:
    """The checked checkpoint of a directory; its files are closed at the end."""
    names, places = _find(directory)
    files: dict[str, Any] = {}
    for name in names:
        path = directory / name
        _check_file(path)
        try:
            files[name] = safe_open(str(path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(str(path), f"not a whole safetensors file ({error})") from None
    if places is None:
        places = {tensor: name for name, file in files.items() for tensor in file.keys()}  # noqa: SIM118
    checkpoint = Checkpoint(files, places, directory)
    checkpoint.check(expected)
    try:
        yield checkpoint
    finally:
        files.clear()


def weights_fingerprint(directory: Path) -> str:
    """XXH3-128 over all weight files, hex. Reads them through the page cache at memory speed, which also
    warms it for the load. It tells apart weights that differ by accident or by version; it is no signature."""
    digest = xxhash.xxh3_128()
    for name in _find(directory)[0]:
        path = directory / name
        _check_file(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            digest.update(content)
    return digest.hexdigest()


def _find(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """Weight files in a fixed order and, if there is an index, tensor -> file."""
    if not directory.is_dir():
        raise CheckpointError(str(directory), "no such directory")
    index = directory / INDEX_FILE
    if not index.is_file():
        if not (directory / SINGLE_FILE).is_file():
            raise CheckpointError(str(directory), f"neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [SINGLE_FILE], None
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise CheckpointError(str(index), f"over {MAX_INDEX_BYTES} bytes")
    try:
        places = json.loads(index.read_bytes())["weight_map"]
        names = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(str(index), "weight_map: missing or malformed") from None
    if len(names) > MAX_FILES:
        raise CheckpointError(str(index), f"weight_map: {len(names)} files, limit {MAX_FILES}")
    for name in names:
        # A name from the index must not lead out of the directory.
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(str(index), f"weight_map: {name!r} is not a safetensors file name")
        if not (directory / name).is_file():
            raise CheckpointError(str(directory / name), "missing, but named by the index")
    return names, places


def _check_file(path: Path) -> None:
    """The 8 bytes that say how long the header is, before a library takes memory for it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
    if len(head) < 8:
        raise CheckpointError(str(path), f"not a safetensors file ({size} bytes)")
    (header_bytes,) = struct.unpack("<Q", head)
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(str(path), "not a whole safetensors file (its header is longer than it)")
