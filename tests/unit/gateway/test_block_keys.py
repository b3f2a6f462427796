"""The gateway names blocks as the workers' caches do."""

from __future__ import annotations

import asyncio

import numpy as np

from kvferry.kv.events import pack_keys
from kvferry.kv.hashing import block_hashes, root_hash
from kvferry.wire.fields import pack_tokens
from kvferry_gateway.placement.block_keys import HASHED_AT_ONCE, BlockFormat, BlockKeys
from kvferry_gateway.placement.prefix_index import index_keys

FORMAT = BlockFormat("f", 4)


def named(tokens: list[int], salt: bytes, block_format: BlockFormat = FORMAT) -> tuple[int, ...]:
    root = root_hash(block_format.kv_format_id, "", salt)
    return tuple(index_keys(pack_keys(block_hashes(root, np.array(tokens, dtype="<u4"), block_format.block_size))))


async def test_keys_grow_with_what_is_generated() -> None:
    prompt = list(range(10))
    keys = BlockKeys(pack_tokens(prompt), b"salt")
    assert await keys.of(FORMAT, []) == named(prompt, b"salt")
    assert len(await keys.of(FORMAT, [])) == 2, "the last two tokens fill no block"
    assert await keys.of(FORMAT, [7, 8, 9]) == named([*prompt, 7, 8, 9], b"salt")
    assert await keys.of(FORMAT, [7, 8, 9]) != named([*prompt, 7, 8, 9], b"pepper")


async def test_another_format_has_other_keys() -> None:
    prompt = list(range(10))
    keys = BlockKeys(pack_tokens(prompt), b"")
    first = await keys.of(FORMAT, [])
    other = BlockFormat("g", 2)
    assert await keys.of(other, []) == named(prompt, b"", other)
    assert await keys.of(FORMAT, []) == first


async def test_others_get_their_turn_while_a_long_prompt_is_hashed() -> None:
    prompt = list(range(10 * HASHED_AT_ONCE * FORMAT.block_size))
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    found = await BlockKeys(pack_tokens(prompt), b"").of(FORMAT, [])
    beside.cancel()
    assert turns >= 9
    assert found == named(prompt, b"")


async def test_an_empty_prompt_has_no_keys() -> None:
    assert await BlockKeys(b"", b"").of(FORMAT, []) == ()
