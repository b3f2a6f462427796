"""Writing a safetensors file piece by piece: one header, then the tensors' bytes one after the other.

    length of the header u64 | header JSON, padded with spaces to 8 bytes | data

The safetensors library wants all tensors in memory and has no bfloat16 in its numpy form; an import has
neither the need nor, for a large model, the room.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TensorSpec:
    """A bfloat16 tensor of a row-major `shape`."""

    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return 2 * prod(self.shape)


class SafetensorsWriter:
    """Writes bfloat16 tensors in the order of `tensors`. Call `append` until all is written, then `finish`."""

    def __init__(self, stream: BinaryIO, tensors: Mapping[str, TensorSpec]) -> None:
        self._stream = stream
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, spec in tensors.items():
            begin, end = end, end + spec.num_bytes
            header[name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [begin, end]}
        self._missing = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        stream.write(len(encoded).to_bytes(8, "little") + encoded)

    def append(self, bits: npt.NDArray[np.uint16]) -> None:
        """The next bfloat16 values as bits, any shape."""
        self._missing -= bits.nbytes
        assert self._missing >= 0, "more data than the header announces"
        self._stream.write(np.ascontiguousarray(bits, dtype="<u2").data)

    def finish(self) -> None:
        assert self._missing == 0, "less data than the header announces"
