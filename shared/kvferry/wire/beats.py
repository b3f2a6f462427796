"""What every process tells of itself, all the time: that it lives, what it does, that one has ended."""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import MAX_ROWS, U32, U64, Count, Name, Seconds, Text
from kvferry.wire.record import WorkerRecord
from kvferry.wire.work import NUM_PRIORITY_CLASSES

MAX_RECENT_PULLS: Final = 32  # in one heartbeat
MAX_BLOCK_STATES: Final = 16

WorkerState = Literal["loading", "ready", "draining", "wedged"]
SequenceState = Literal["waiting", "computing", "held", "opening", "fetching", "running", "ended"]
PullTime: TypeAlias = tuple[U64, Count, Seconds]  # prefill incarnation, bytes, seconds


class Load(Message, frozen=True):
    """What a worker is doing, for placement and for operators."""

    num_waiting: Count = 0
    num_running: Count = 0
    waiting_tokens: Count = 0  # prompt tokens to compute, queued or under way, without those that its cache has now
    free_blocks: Count = 0  # free or evictable
    prefill_tokens_per_s: Seconds = 0.0  # this worker's own measured rate, 0 when unknown
    decode_step_s: Seconds = 0.0  # mean step time of late, 0 when unknown
    steps: Count = 0  # engine steps ended since start
    cache_seq: U64 = 0  # number of its last `CacheEvents`: shows who has missed it
    # `waiting_tokens` by priority class; empty from a worker that does not say.
    queued_tokens: Annotated[tuple[Count, ...], Meta(max_length=NUM_PRIORITY_CLASSES)] = ()
    pulls: Annotated[tuple[PullTime, ...], Meta(max_length=MAX_RECENT_PULLS)] = ()  # ended since the last heartbeat
    # How many of its blocks are in which state, as its ledger names them; empty from a worker that does not say.
    blocks: Annotated[dict[Name, Count], Meta(max_length=MAX_BLOCK_STATES)] = {}  # noqa: RUF012 - msgspec copies it


class Held(Message, frozen=True):
    """One sequence of one gateway on this worker."""

    stream_id: U32
    state: SequenceState
    next_index: U32
    next_scored: U32 = 0  # position behind the prompt's last token whose log-probabilities were sent; 0: none were
    # How far it is: `computing` counts tokens of the text, `fetching` bytes of KV. A `total` of 0 says nothing.
    done: Count = 0
    total: Count = 0


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """Worker -> all gateways, every 250 ms; liveness is judged by it."""

    beat: U32
    state: WorkerState
    record: WorkerRecord
    load: Load
    sequences: Annotated[dict[Name, Annotated[tuple[Held, ...], Meta(max_length=MAX_ROWS)]], Meta(max_length=1024)] = {}  # noqa: RUF012 - msgspec copies it; keyed by gateway subject


class GatewayHeartbeat(Message, frozen=True, tag="gateway_heartbeat"):
    """Gateway -> all workers, every 250 ms. A worker whose stream is missing from it cancels that stream."""

    beat: U32
    name: Name
    incarnation: U64
    subject: Text
    pid: U32
    live: Annotated[
        tuple[tuple[U64, Annotated[tuple[U32, ...], Meta(max_length=MAX_ROWS)]], ...], Meta(max_length=4096)
    ] = ()  # (worker incarnation, live stream ids)


class ExitNotice(Message, frozen=True, tag="exit"):
    """Supervisor -> all: this incarnation's process ended."""

    incarnation: U64
    cause: Literal["crashed", "killed", "stopped"]
