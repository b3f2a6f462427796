"""Chained block hashes: the names under which the prefix cache finds blocks and a pull proves its range.

    root      = H("kvferry.kv.root.1", kv_format_id, adapter_id, salt)
    hash(0)   = H(root, tokens of block 0)
    hash(i)   = H(hash(i - 1), tokens of block i)

H is SHA-256 cut to 128 bits; tokens are little-endian u32. A hash therefore names the whole prefix up to
the end of its block, and nothing computed under another format, adapter or salt can be mistaken for it.
"""

from __future__ import annotations

import hashlib
import struct
from typing import Final, TypeAlias

from kvferry.wire.fields import TokenArray

HASH_BYTES: Final = 16
TOKEN_BYTES: Final = 4
_ROOT_DOMAIN: Final = b"kvferry.kv.root.1"
_LENGTH: Final = struct.Struct("<I")

BlockHash: TypeAlias = bytes  # HASH_BYTES long


def root_hash(kv_format_id: str, adapter_id: str = "", salt: bytes = b"") -> BlockHash:
    """The parent of every first block. `adapter_id` is empty for the base model."""
    digest = hashlib.sha256(_ROOT_DOMAIN)
    for part in (kv_format_id.encode(), adapter_id.encode(), salt):
        # Lengths keep ("ab", "c") and ("a", "bc") apart.
        digest.update(_LENGTH.pack(len(part)))
        digest.update(part)
    return digest.digest()[:HASH_BYTES]


def token_bytes(tokens: TokenArray) -> bytes:
    """Token ids, u32 [num_tokens], as they are hashed: little-endian, 4 bytes each.

    Raises TypeError for an array that a cast could cut, such as int64.
    """
    return tokens.astype("<u4", casting="safe", copy=False).tobytes()


def block_hashes(root: BlockHash, tokens: TokenArray, block_size: int) -> list[BlockHash]:
    """One hash for each *full* block of `tokens` (u32 [num_tokens]); a partial tail has none."""
    return _chain(root, token_bytes(tokens), block_size * TOKEN_BYTES)


def chain_hash(root: BlockHash, tokens: TokenArray, block_size: int, end: int) -> BlockHash:
    """The hash at token `end`: over the full blocks before it, then over the rest as a shorter block.

    `end` 0 gives the root. Both sides of a pull compute it for the start and the end of the range.
    """
    assert 0 <= end <= len(tokens), f"end {end} outside {len(tokens)} tokens"
    prefix = token_bytes(tokens[:end])
    full = _chain(root, prefix, block_size * TOKEN_BYTES)
    parent = full[-1] if full else root
    tail = prefix[len(full) * block_size * TOKEN_BYTES :]
    return _link(parent, tail) if tail else parent


def _chain(root: BlockHash, prefix: bytes, block_bytes: int) -> list[BlockHash]:
    assert len(root) == HASH_BYTES, f"root of {len(root)} bytes"
    hashes = []
    parent = root
    for start in range(0, len(prefix) - block_bytes + 1, block_bytes):
        parent = _link(parent, prefix[start : start + block_bytes])
        hashes.append(parent)
    return hashes


def _link(parent: BlockHash, tokens: bytes) -> BlockHash:
    return hashlib.sha256(parent + tokens).digest()[:HASH_BYTES]
