"""The types of fields, and their bounds.

Token ids travel as little-endian u32 in a `bin` field. Durations are seconds; no instant crosses the wire but
`arrival`, which is only an ordering key.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Meta

MAX_TOKEN_BYTES: Final = 4 * (1 << 20)
MAX_NAME_CHARS: Final = 128
MAX_ROWS: Final = 1 << 16

U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
# msgpack integers reach 2**64 - 1, msgspec's bounds only 2**63 - 1: the lower bound is enough here.
U64 = Annotated[int, Meta(ge=0)]
Ticket = Annotated[bytes, Meta(min_length=16, max_length=16)]
Tokens = Annotated[bytes, Meta(max_length=MAX_TOKEN_BYTES)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Text = Annotated[str, Meta(max_length=1024)]
Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]
Heads = tuple[U16, U16]  # KV heads of the whole model: the first, and the one after the last

TokenArray: TypeAlias = npt.NDArray[np.uint32]
Role = Literal["gateway", "prefill", "decode"]
WORKER_ROLES: Final = ("prefill", "decode")


def pack_tokens(tokens: TokenArray | list[int] | tuple[int, ...]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def unpack_tokens(column: bytes) -> TokenArray:
    """Read-only view, u32 [num_tokens]. The caller has checked that the length is a multiple of 4."""
    return np.frombuffer(column, dtype="<u4")
