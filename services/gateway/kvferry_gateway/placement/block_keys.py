"""The names of a prompt's blocks, under which the prefix index knows who has them cached."""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

import numpy as np

from kvferry.kv.events import pack_keys
from kvferry.kv.hashing import block_hashes, root_hash
from kvferry.wire.fields import pack_tokens, unpack_tokens
from kvferry_gateway.placement.prefix_index import index_keys

HASHED_AT_ONCE: Final = 256  # blocks, before the loop may do something else: below 1 ms


class BlockFormat(NamedTuple):
    """What the names of blocks depend on, besides their tokens and the salt."""

    kv_format_id: str
    block_size: int


class BlockKeys:
    """Of one unit: prompt and what it has generated. Each block is hashed once, however often it is placed."""

    def __init__(self, prompt: bytes, salt: bytes) -> None:
        """`prompt`: u32 column."""
        self._prompt = unpack_tokens(prompt)
        self._salt = salt
        self._format: BlockFormat | None = None
        self._parent = b""
        self._keys: list[int] = []

    async def of(self, block_format: BlockFormat, generated: list[int]) -> tuple[int, ...]:
        """The keys of all full blocks. A long prompt is hashed piece by piece, and others get their turn."""
        if block_format != self._format:
            self._format = block_format
            self._parent = root_hash(block_format.kv_format_id, "", self._salt)
            self._keys.clear()
        size = block_format.block_size
        tokens = np.concatenate((self._prompt, unpack_tokens(pack_tokens(generated))))
        num_full = len(tokens) // size
        while (begin := len(self._keys)) < num_full:
            end = min(num_full, begin + HASHED_AT_ONCE)
            hashes = block_hashes(self._parent, tokens[begin * size : end * size], size)
            self._parent = hashes[-1]
            self._keys += index_keys(pack_keys(hashes))
            if end < num_full:
                await asyncio.sleep(0)
        return tuple(self._keys)
