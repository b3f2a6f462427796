"""Reading safetensors files: header checked, tensors read one by one into memory of their own.

    length of the header u64 | header JSON: name -> dtype, shape, data_offsets | data

The safetensors library has no bfloat16 without torch, and maps the file: what is mapped counts as the process's
memory, and changes or ends the process when the file is overwritten or cut under it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from kvferry.errors import CheckpointError

MAX_HEADER_BYTES: Final = 64 << 20
MAX_DIMENSIONS: Final = 8
# How each dtype is held in numpy; bfloat16 as its bits.
FLOAT_DTYPES: Final[Mapping[str, type[np.generic]]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where one tensor lies in its file."""

    dtype: str  # as the file has it: "BF16", "F16", "F32", or one that is not supported
    shape: tuple[int, ...]
    start: int  # from the start of the file
    end: int


class SafetensorsFile:
    """One open file."""

    def __init__(self, path: Path, stream: BufferedReader) -> None:
        self.path = path
        self._stream = stream
        self.tensors: Mapping[str, Stored] = _header(path, stream)

    def read(self, name: str, first_row: int = 0, end_row: int | None = None) -> npt.NDArray[Any]:
        """A tensor of a supported dtype, or a range of its rows, in fresh memory."""
        stored = self.tensors[name]
        num_rows, *row = stored.shape
        array = np.empty((min(end_row or num_rows, num_rows) - first_row, *row), FLOAT_DTYPES[stored.dtype])
        self._stream.seek(stored.start + first_row * prod(row) * array.itemsize)
        if self._stream.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
            raise CheckpointError(str(self.path), f"{name}: the file ends in the middle of it")
        return array


@contextmanager
def open_safetensors(path: Path) -> Iterator[SafetensorsFile]:
    """Raises `CheckpointError` for a file that is not a whole safetensors file."""
    try:
        stream = path.open("rb")
    except OSError as error:
        raise CheckpointError(str(path), error.strerror or "cannot be read") from None
    with stream:
        yield SafetensorsFile(path, stream)


def _header(path: Path, stream: BufferedReader) -> Mapping[str, Stored]:
    """Checked against the file's size before any memory is taken for it."""
    size = path.stat().st_size
    head = stream.read(8)
    if len(head) < 8:
        raise CheckpointError(str(path), f"not a safetensors file ({size} bytes)")
    (header_bytes,) = struct.unpack("<Q", head)
    if header_bytes > min(MAX_HEADER_BYTES, size - 8):
        raise CheckpointError(str(path), "not a whole safetensors file (its header is longer than it)")
    try:
        header = json.loads(stream.read(header_bytes))
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
        header.pop("__metadata__", None)
        tensors = {name: _stored(entry, 8 + header_bytes) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(str(path), f"not a safetensors file (its header: {error})") from None
    if max((stored.end for stored in tensors.values()), default=size) != size:
        raise CheckpointError(str(path), f"not a whole safetensors file ({size} bytes, its header tells otherwise)")
    return tensors


def _stored(entry: Any, origin: int) -> Stored:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError("an entry is malformed")
    if len(shape) > MAX_DIMENSIONS or end < start:
        raise ValueError("an entry is out of bounds")
    if dtype in FLOAT_DTYPES and end - start != prod(shape) * np.dtype(FLOAT_DTYPES[dtype]).itemsize:
        raise ValueError("an entry's bytes do not match its shape")
    return Stored(dtype, tuple(shape), origin + start, origin + end)
