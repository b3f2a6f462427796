"""Digests of single token slots, to compare two pools slot by slot.

Apart from the frames' own checksum on purpose: another function (BLAKE2b, not XXH3), over other bytes
(what stands in the pools, not what was packed), so a fault that the frame check shares cannot hide in both.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

DIGEST_BYTES: Final = 16


def slot_digest(payload: memoryview | bytes | bytearray) -> bytes:
    """Digest of one token's KV over all layers, as gathered for a piece of that single token."""
    return hashlib.blake2b(payload, digest_size=DIGEST_BYTES).digest()


def slot_digests(payload: memoryview | bytes | bytearray, num_layers: int, num_tokens: int) -> list[bytes]:
    """`slot_digest` of each token of a gathered piece, token by token.

    `payload` has the frame's layout, [num_layers, 2, num_tokens, kv_heads, head_dim]. The result does not
    depend on how many tokens were gathered together. Raises ValueError if the sizes do not divide.
    """
    num_bytes = memoryview(payload).nbytes
    if num_layers <= 0 or num_tokens <= 0 or num_bytes % (num_layers * 2 * num_tokens):
        raise ValueError(f"{num_bytes} bytes are not {num_layers} layers of {num_tokens} tokens")
    rows = np.frombuffer(payload, dtype=np.uint8).reshape(num_layers * 2, num_tokens, -1)
    return [slot_digest(rows[:, token].tobytes()) for token in range(num_tokens)]
