"""Reads a model directory's safetensors files: finds them, checks every tensor, names what is wrong.

Nothing is used before the whole set of names and shapes has been checked, so a broken checkpoint fails in
milliseconds and not in mid-load.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import xxhash

from kvferry.engine.config import ModelConfig
from kvferry.engine.safetensors import FLOAT_DTYPES, SafetensorsFile, open_safetensors
from kvferry.errors import CheckpointError

SINGLE_FILE: Final = "model.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
MAX_INDEX_BYTES: Final = 64 << 20
MAX_FILES: Final = 4096
FINGERPRINT_CHUNK: Final = 1 << 20  # bytes
FINGERPRINT_ELEMENTS: Final = 1 << 20  # of a tensor, at once

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
    """The open, checked files of one model directory. Tensors are read one by one, into memory of their own."""

    def __init__(self, files: Mapping[str, SafetensorsFile], places: Mapping[str, str], directory: Path) -> None:
        self._files = files  # by name
        self._places = places  # tensor -> name of its file
        self._directory = directory

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """A tensor as stored: fp32, fp16, or the bits of bfloat16 as u16."""
        return self._files[self._places[name]].read(name)

    def rows(self, name: str, rows: range) -> npt.NDArray[Any]:
        """Some rows of it; nothing else is read."""
        return self._files[self._places[name]].read(name, rows.start, rows.stop)

    def pieces(self, name: str, rows: range, max_elements: int) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """Some rows of it, in pieces of (first row, [n, k]) of at most `max_elements` or one row."""
        file = self._files[self._places[name]]
        row = prod(file.tensors[name].shape[1:])
        count = max(max_elements // row, 1)
        for start in range(rows.start, rows.stop, count):
            yield start, file.read(name, start, min(start + count, rows.stop)).reshape(-1, row)

    def fingerprint(self, rows: Mapping[str, range | None]) -> str:
        """XXH3-128, hex, over some rows of tensors (None: all of them), with their names, dtypes and shapes. Nothing
        else is read. No signature either."""
        digest = xxhash.xxh3_128()
        for name, wanted in rows.items():
            stored = self._files[self._places[name]].tensors[name]
            wanted = range(stored.shape[0]) if wanted is None else wanted
            digest.update(repr((name, stored.dtype, stored.shape, wanted.start, wanted.stop)).encode())
            for _, piece in self.pieces(name, wanted, FINGERPRINT_ELEMENTS):
                digest.update(piece.data)
        return digest.hexdigest()

    def check(self, expected: Shapes) -> None:
        """Raises `CheckpointError` for a missing tensor, a wrong shape or a dtype that is no float."""
        for name, shape in expected.items():
            if name not in self._places:
                raise CheckpointError(str(self._directory), f"{name}: missing")
            file = self._files[self._places[name]]
            stored = file.tensors.get(name)
            if stored is None:
                raise CheckpointError(str(file.path), f"{name}: the index places it here, but the file lacks it")
            if stored.shape != shape:
                problem = f"{name}: shape {list(stored.shape)}, expected {list(shape)}"
                raise CheckpointError(str(file.path), problem)
            if stored.dtype not in FLOAT_DTYPES:
                problem = f"{name}: dtype {stored.dtype}, supported: {', '.join(FLOAT_DTYPES)}"
                raise CheckpointError(str(file.path), problem)


@contextmanager
def open_checkpoint(directory: Path, expected: Shapes) -> Iterator[Checkpoint]:
    """The checked checkpoint of a directory; its files are closed at the end."""
    names, places = _find(directory)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open_safetensors(directory / name)) for name in names}
        if places is None:
            places = {tensor: name for name, file in files.items() for tensor in file.tensors}
        checkpoint = Checkpoint(files, places, directory)
        checkpoint.check(expected)
        yield checkpoint


def weights_fingerprint(directory: Path) -> str:
    """XXH3-128 over all weight files, hex. Reads them through the page cache at memory speed, which also
    warms it for the load. It tells apart weights that differ by accident or by version; it is no signature."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(FINGERPRINT_CHUNK))
    for name in _find(directory)[0]:
        try:
            with (directory / name).open("rb", buffering=0) as file:
                while count := file.readinto(buffer):
                    digest.update(buffer[:count])
        except OSError as error:
            raise CheckpointError(str(directory / name), error.strerror or "cannot be read") from None
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
