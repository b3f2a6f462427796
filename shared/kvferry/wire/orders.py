"""What workers are told beside requests."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import MAX_ROWS, U32, U64, Ticket


class Cancel(Message, frozen=True, tag="cancel"):
    """Gateway -> worker: this attempt is over. For an unknown one it leaves a tombstone."""

    ticket: Ticket
    attempt: U32


class Fence(Message, frozen=True, tag="fence"):
    """Gateway -> worker: drop all of this gateway's attempts up to and including `highest_attempt`."""

    worker_incarnation: U64
    gateway_incarnation: U64
    highest_attempt: U32


class Resend(Message, frozen=True, tag="resend"):
    """Gateway -> worker: publish these streams' tokens again, from these indices."""

    gateway_incarnation: U64
    streams: Annotated[tuple[tuple[U32, U32], ...], Meta(max_length=MAX_ROWS)]  # (stream_id, next index)
    # (stream_id, position of the prompt's first token that lacks its log-probabilities)
    prompts: Annotated[tuple[tuple[U32, U32], ...], Meta(max_length=MAX_ROWS)] = ()


class EndAck(Message, frozen=True, tag="end_ack"):
    """Gateway -> worker: these streams' ends have arrived; their tokens may be forgotten.

    `scored`: of these the log-probabilities of the whole prompt have arrived, which may be forgotten, too.
    """

    gateway_incarnation: U64
    stream_ids: Annotated[tuple[U32, ...], Meta(max_length=MAX_ROWS)]
    scored: Annotated[tuple[U32, ...], Meta(max_length=MAX_ROWS)] = ()


class Ping(Message, frozen=True, tag="ping"):
    """Anyone -> worker, answered `Pong`."""

    nonce: U64


class Pong(Message, frozen=True, tag="pong"):
    nonce: U64
    incarnation: U64


class Drain(Message, frozen=True, tag="drain"):
    """Operator -> worker: take no more, finish or hand over, exit within the grace time."""

    worker_incarnation: U64


class CacheResync(Message, frozen=True, tag="cache_resync"):
    """Gateway -> worker: cache events were lost; publish a snapshot."""

    worker_incarnation: U64
