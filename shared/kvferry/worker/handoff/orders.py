"""What a worker's leader and a shard of it say to each other about hand-offs.

    leader                                          shard of P
                                         <-           Asked: a shard of D wants a part of a pull
    Serve(blocks, tokens computed)         ->         sends what is computed
    Computed, Finish(manifest)             ->         sends the rest
    Stop                                   ->         only pads from here on
                                         <-           Served: no copy reads the blocks any more

    leader                                          shard of D
    Land(P's shard, heads, blocks)         ->         fetches the part into its own blocks
                                         <-           Progressed, now and then
                                         <-           Landed(manifest), or Lost(why)
    Settle(right or not)                   ->         tells P's shard so
                                         <-           Settled: no copy writes into the blocks any more

    leader                                          any shard
    CountSlots                             ->
                                         <-           Slots: how many are in which state

A leader keeps the blocks from Serve to Served, and from Land to Settled. Each part has a number, given by who begins.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from kvferry.transport.slots import SlotState
from kvferry.wire.fields import U32, U64, Count, Heads, Name, Ticket
from kvferry.wire.flow import Manifest

AbortReason = Literal["asked", "expired", "cancelled", "reclaimed", "superseded", "draining", "ended", "refused"]


class Begin(msgspec.Struct, frozen=True, tag="begin", array_like=True):
    """The first word to a shard on another host: what its data plane is like."""

    serves: bool  # a prefill worker's: others connect to it
    incarnation: U64
    transport: Name
    num_slots: U32
    slot_bytes: U32  # payload


class Listening(msgspec.Struct, frozen=True, tag="listening", array_like=True):
    """The answer."""

    address: Annotated[str, Meta(max_length=2048)]
    heads: Heads  # that it has of the whole model


class Asked(msgspec.Struct, frozen=True, tag="asked", array_like=True):
    part: U64
    pull_id: U32
    ticket: Ticket
    attempt: U32
    from_token: Count


class Serve(msgspec.Struct, frozen=True, tag="serve", array_like=True):
    part: U64
    blocks: bytes  # i32, little-endian
    num_computed: Count
    request_id: Name


class Computed(msgspec.Struct, frozen=True, tag="computed", array_like=True):
    part: U64
    num_computed: Count


class Finish(msgspec.Struct, frozen=True, tag="finish", array_like=True):
    part: U64
    manifest: Manifest  # without its number of frames


class Stop(msgspec.Struct, frozen=True, tag="stop", array_like=True):
    part: U64
    reason: AbortReason


class Served(msgspec.Struct, frozen=True, tag="served", array_like=True):
    part: U64
    num_bytes: Count  # sent


class Land(msgspec.Struct, frozen=True, tag="land", array_like=True):
    part: U64
    pull_id: U32
    ticket: Ticket
    attempt: U32
    address: Annotated[str, Meta(max_length=2048)]  # of P's shard
    incarnation: U64  # of P
    heads: Heads
    from_token: Count
    num_context: Count
    blocks: bytes
    request_id: Name


class Progressed(msgspec.Struct, frozen=True, tag="progressed", array_like=True):
    """A frame has come since the last one of these, or it waits for a slot."""

    part: U64


class Landed(msgspec.Struct, frozen=True, tag="landed", array_like=True):
    part: U64
    manifest: Manifest
    manifest_frame: U32
    num_bytes: Count


class Lost(msgspec.Struct, frozen=True, tag="lost", array_like=True):
    """`detail` is a kind of transfer failure."""

    part: U64
    reason: Literal["prefill_lost", "transfer_failed"]
    detail: Name


class Settle(msgspec.Struct, frozen=True, tag="settle", array_like=True):
    part: U64
    right: bool


class Settled(msgspec.Struct, frozen=True, tag="settled", array_like=True):
    part: U64


class CountSlots(msgspec.Struct, frozen=True, tag="count_slots", array_like=True):
    """Somebody looks at `/debug/blocks`."""


class Slots(msgspec.Struct, frozen=True, tag="slots", array_like=True):
    counts: dict[SlotState, Count]


Order = Begin | Serve | Computed | Finish | Stop | Land | Settle | CountSlots
Word = Listening | Asked | Served | Progressed | Landed | Lost | Settled | Slots
