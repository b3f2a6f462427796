"""What a worker is."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import U16, U32, U64, Count, Heads, Name, Role, Text

MAX_SHARDS: Final = 64
MAX_FEATURES: Final = 64  # of one worker

# What a worker of an older version would pass over in silence, or not understand.
Feature = Literal["scoring", "tagged"]


class WorkerAddress(Message, frozen=True):
    """Where the shards of a worker listen on the data plane: the leader, which has the KV heads of all ranks on its
    host, and then each rank on another host."""

    incarnation: U64
    shards: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=MAX_SHARDS)]
    heads: Annotated[tuple[Heads, ...], Meta(max_length=MAX_SHARDS)] = ()  # of each shard; none: the one has them all


class WorkerRecord(Message, frozen=True):
    """What a worker is: fixed for one incarnation, sent with each heartbeat."""

    role: Role
    name: Name
    incarnation: U64
    pid: U32
    subject: Text
    model: Name
    transport: Name
    address: WorkerAddress
    kv_format_id: Name  # P and D pair only if equal
    numerics_id: Name  # names what a result's bits depend on
    max_model_len: Count
    block_size: U32
    num_blocks: U32
    kv_token_bytes: U32  # KV bytes of one token, all layers
    debug_port: U16 = 0
    exact: bool = False  # it runs `exact`: its units stay on its numerics_id
    engine: Name = ""  # what runs the model
    engine_reason: Text = ""  # why that one
    grammars: bool = False  # it follows grammars
    kv_dtype: Name = ""  # that the KV format names, for people; empty from a worker that does not say
    vocabulary_id: Name = ""  # of its tokenizer, see `kvferry.text.vocabulary`; empty: not known
    features: Annotated[tuple[Name, ...], Meta(max_length=MAX_FEATURES)] = ()  # `Feature`s, and those of later versions
    ranks: U16 = 1  # processes that its model is split over
