"""Messages of the data plane: the flow control of a pull. KV itself travels in frames (`frame.py`).

    D                                  P
    Open(ticket, attempt)         ->        parked up to 1 s for a request that P has not seen
                                  <-   Progress (memory held, tokens done, expected end), repeated
    Fetch(from_token, credits)    ->        once D has blocks
                                  <-   frames, one per credit, tags (pull_id, frame)
    Credit(credits, again)        ->        a bad frame is asked for again alone
                                  <-   last frame: `Manifest`
    Ack                           ->        P frees its blocks or keeps them as prefix cache
    Abort                         ->
                                  <-   Aborted(last frame sent): also unasked, with its reason

P uses up every credit it got, with pad frames at the end, so that every receive D posted completes.

Where a worker has ranks on other hosts, these are shards of it, and the pull has parts: each shard of D asks the shard
of P that has its heads for them, on a connection of their own. The above is said between the leaders, whose Fetch
names the heads of their own part; between two other shards it is

    FetchPart(heads, ticket, …)   ->        nothing is sent before P's leader knows the pull, and its Fetch
                                  <-   frames, one per credit, tags (pull_id, frame)
    Credit(credits, again)        ->
                                  <-   last frame: `Manifest`
    Ack                           ->        all parts are right
    Abort                         ->
                                  <-   Aborted: also unasked

`pull_id` is D's, counted from the low half of its incarnation on, so that a frame that strays from one D's pull to
another's is seen to be foreign; a new one for the same ticket ends the one before.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from kvferry.wire.codec import Codec, Message
from kvferry.wire.fields import U32, U64, Count, Heads, Name, Seconds, Ticket
from kvferry.wire.tokens import LogprobColumns

MAX_FLOW_BYTES: Final = 4096  # of one flow message, encoded
MAX_CREDITS: Final = 64

Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Proof = Annotated[bytes, Meta(min_length=32, max_length=32)]


class Hello(Message, frozen=True, tag="hello"):
    """First message in both directions."""

    incarnation: U64
    nonce: Nonce


class Prove(Message, frozen=True, tag="prove"):
    """HMAC-SHA256 over (side, both nonces, both incarnations) with the cluster's data key."""

    proof: Proof


class Open(Message, frozen=True, tag="open"):
    pull_id: U32
    ticket: Ticket
    attempt: U32


class Unknown(Message, frozen=True, tag="unknown"):
    """P has no live (ticket, attempt): wrong, replayed, expired or cancelled."""

    pull_id: U32


class Progress(Message, frozen=True, tag="progress"):
    pull_id: U32
    holds_memory: bool
    num_computed: Count
    num_tokens: Count
    expected_s: Seconds  # until the last token is computed, as far as P can tell


class Fetch(Message, frozen=True, tag="fetch"):
    pull_id: U32
    from_token: Count  # a multiple of the block size, or the number of tokens
    credits: Annotated[int, Meta(ge=1, le=MAX_CREDITS)]
    heads: Heads | None = None  # None: all


class FetchPart(Message, frozen=True, tag="part"):
    """A shard of D wants its part of the pull that its leader has opened at P's."""

    pull_id: U32
    ticket: Ticket
    attempt: U32
    from_token: Count
    credits: Annotated[int, Meta(ge=1, le=MAX_CREDITS)]
    heads: Heads


class Credit(Message, frozen=True, tag="credit"):
    """So many more receives are posted. `again` names bad frames: their ranges are sent anew."""

    pull_id: U32
    credits: Annotated[int, Meta(ge=0, le=MAX_CREDITS)]
    again: Annotated[tuple[U32, ...], Meta(max_length=MAX_CREDITS)] = ()


class Abort(Message, frozen=True, tag="abort"):
    pull_id: U32


class Aborted(Message, frozen=True, tag="aborted"):
    """P sends no more for this pull but pads up to the credits it has. `ended`: the first token ends the sequence."""

    pull_id: U32
    last_frame: U32
    reason: Literal["asked", "expired", "cancelled", "reclaimed", "superseded", "draining", "ended", "refused"]


class Ack(Message, frozen=True, tag="ack"):
    pull_id: U32


class Manifest(Message, frozen=True, tag="manifest"):
    """Payload of the last frame of a pull, or of a part of it."""

    num_frames: U32  # KV frames sent, repeats included, this one excluded
    kv_format_id: Name
    hash_from: Annotated[bytes, Meta(min_length=16, max_length=16)]  # chain hash at `from_token`
    hash_end: Annotated[bytes, Meta(min_length=16, max_length=16)]
    first_tokens: Annotated[tuple[tuple[U32, U32], ...], Meta(max_length=1024)]  # (choice, token)
    cached_tokens: Count = 0  # of the prompt, found in P's prefix cache
    elapsed_s: Seconds = 0.0  # from the end of the last prefill step to this manifest
    logprobs: LogprobColumns | None = None  # of `first_tokens`, where they are wanted


Flow = Hello | Prove | Open | Unknown | Progress | Fetch | FetchPart | Credit | Abort | Aborted | Ack


class FlowCodec(Codec[Flow]):
    def __init__(self) -> None:
        super().__init__(Flow)


class ManifestCodec(Codec[Manifest]):
    def __init__(self) -> None:
        super().__init__(Manifest)
