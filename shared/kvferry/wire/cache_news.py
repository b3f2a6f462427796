"""Which KV blocks a worker's prefix cache holds."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import U16, U64

MAX_CACHE_KEYS: Final = 1 << 12  # in one message, so that it costs its receiver no more than 1 ms; more are split
CacheKeys = Annotated[bytes, Meta(max_length=8 * MAX_CACHE_KEYS)]  # u64 LE column, see `kvferry.kv.events`


class CacheEvents(Message, frozen=True, tag="cache_events"):
    """Worker -> all gateways: blocks that became findable, and that no longer are, since the batch before.

    `seq` counts the batches of one incarnation from 1. No key stands in both columns, so their order is of no matter.
    """

    incarnation: U64
    seq: U64
    stored: CacheKeys = b""
    evicted: CacheKeys = b""


class CacheSnapshot(Message, frozen=True, tag="cache_snapshot"):
    """Worker -> all gateways, in answer to `CacheResync`: one part of all that is findable after batch `seq`."""

    incarnation: U64
    seq: U64
    part: U16
    num_parts: Annotated[int, Meta(ge=1, le=(1 << 16) - 1)]
    keys: CacheKeys = b""
