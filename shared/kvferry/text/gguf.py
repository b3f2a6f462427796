"""A reader for GGUF, the file format of llama.cpp, versions 2 and 3, little-endian.

    magic "GGUF" | version u32 | num_tensors u64 | num_entries u64
    entry:   key string | type u32 | value             (strings: length u64 | bytes, UTF-8)
    tensor:  name string | num_dims u32 | dims u64 × num_dims, fastest first | type u32 | offset u64
    padding to `general.alignment`, then the tensors' data at their offsets

The header is parsed once, field by field, each length checked against a named limit and against what the
file holds before memory is taken for it. Tensor data is read on demand.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Final

from kvferry.errors import CheckpointError
from kvferry.text.dequantize import BLOCK_FORMATS, BlockFormat

MAX_ENTRIES: Final = 1 << 16
MAX_TENSORS: Final = 1 << 16
MAX_NAME_BYTES: Final = 1 << 10  # of a key or tensor name
MAX_STRING_BYTES: Final = 1 << 24
MAX_ARRAY_ITEMS: Final = 1 << 22
MAX_DIMS: Final = 4
MAX_ALIGNMENT: Final = 1 << 16
MAX_TENSOR_ELEMENTS: Final = 1 << 40
MAX_OFFSET: Final = 1 << 50

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final[dict[int, struct.Struct]] = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}

Scalar = int | float | bool | str
Value = Scalar | list[Scalar]


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. `shape` is row-major, slowest first, as in numpy."""

    name: str
    shape: tuple[int, ...]
    format: BlockFormat
    offset: int  # of its first byte in the file

    @property
    def num_values(self) -> int:
        return prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_values // self.format.block_size * self.format.block_bytes


class GgufFile:
    """An open GGUF file: `entries` by key, `tensors` by name. Use as a context manager.

    Raises `CheckpointError`, which names the file and the key or tensor, for anything malformed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path: Final = Path(path)
        try:
            self._stream: Final[BinaryIO] = self.path.open("rb")
        except OSError as error:
            raise CheckpointError(str(self.path), error.strerror or "unreadable") from error
        try:
            self._size: Final = os.fstat(self._stream.fileno()).st_size
            self.entries: Final[dict[str, Value]] = {}
            self.tensors: Final[dict[str, GgufTensor]] = {}
            self._parse()
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stream.close()

    def read(self, tensor: GgufTensor, first: int, count: int) -> bytes:
        """`count` of the tensor's stored bytes from byte `first` of them."""
        self._stream.seek(tensor.offset + first)
        return self._take(count, tensor.name)

    def _error(self, problem: str) -> CheckpointError:
        return CheckpointError(str(self.path), problem)

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._stream.tell():
            raise self._error(f"{what}: file ends early")
        raw = self._stream.read(count)
        if len(raw) != count:
            raise self._error(f"{what}: file ends early")
        return raw

    def _scalar(self, kind: int, what: str) -> int | float | bool:
        layout = _SCALARS[kind]
        (value,) = layout.unpack(self._take(layout.size, what))
        assert isinstance(value, (int, float))
        return value

    def _uint(self, kind: int, what: str, limit: int) -> int:
        value = int(self._scalar(kind, what))
        if value > limit:
            raise self._error(f"{what}: {value} is over the limit of {limit}")
        return value

    def _string(self, what: str, limit: int = MAX_STRING_BYTES) -> str:
        raw = self._take(self._uint(10, what, limit), what)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"{what}: not UTF-8") from error

    def _value(self, kind: int, key: str) -> Value:
        if kind == _STRING:
            return self._string(key)
        if kind in _SCALARS:
            return self._scalar(kind, key)
        if kind != _ARRAY:
            raise self._error(f"{key}: unknown value type {kind}")
        item_kind = self._uint(4, key, _ARRAY + len(_SCALARS))
        count = self._uint(10, key, MAX_ARRAY_ITEMS)
        if item_kind == _STRING:
            return [self._string(key) for _ in range(count)]
        if item_kind not in _SCALARS:
            raise self._error(f"{key}: unknown or nested array type {item_kind}")
        layout = _SCALARS[item_kind]
        return [value for (value,) in layout.iter_unpack(self._take(count * layout.size, key))]

    def _parse(self) -> None:
        if self._take(4, "magic") != _MAGIC:
            raise self._error("not a GGUF file")
        version = self._uint(4, "version", 0xFFFFFFFF)
        if version not in _VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            raise self._error("big-endian GGUF is not read" if big_endian else f"GGUF version {version} is not read")
        num_tensors = self._uint(10, "number of tensors", MAX_TENSORS)
        for _ in range(self._uint(10, "number of entries", MAX_ENTRIES)):
            key = self._string("key", MAX_NAME_BYTES)
            if key in self.entries:
                raise self._error(f"{key}: given twice")
            self.entries[key] = self._value(self._uint(4, key, 0xFFFFFFFF), key)
        headers = [self._tensor_header() for _ in range(num_tensors)]
        alignment = self.entries.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= MAX_ALIGNMENT:
            raise self._error(f"general.alignment: {alignment!r} is not usable")
        start = -(-self._stream.tell() // alignment) * alignment
        for header in headers:
            tensor = header(start)
            if tensor.name in self.tensors:
                raise self._error(f"{tensor.name}: given twice")
            if tensor.offset + tensor.num_bytes > self._size:
                raise self._error(f"{tensor.name}: file ends early")
            self.tensors[tensor.name] = tensor

    def _tensor_header(self) -> Callable[[int], GgufTensor]:
        """A tensor that still waits for the start of the data, which only the end of the headers tells."""
        name = self._string("tensor name", MAX_NAME_BYTES)
        num_dims = self._uint(4, name, MAX_DIMS)
        shape = tuple(self._uint(10, name, MAX_TENSOR_ELEMENTS) for _ in range(num_dims))[::-1]
        kind = self._uint(4, name, 0xFFFFFFFF)
        offset = self._uint(10, name, MAX_OFFSET)
        block_format = BLOCK_FORMATS.get(kind)
        if block_format is None:
            raise self._error(f"{name}: tensor type {kind} is not read")
        if not shape or 0 in shape or shape[-1] % block_format.block_size:
            raise self._error(f"{name}: shape {shape} does not fit blocks of {block_format.block_size}")
        return lambda start: GgufTensor(name, shape, block_format, start + offset)
