"""What workers send their gateways while requests run: tokens, log-probabilities, ends."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import MAX_ROWS, U32, U64, Seconds, Text, Tokens

MAX_SCORED_ROWS: Final = 512  # tokens of prompts whose log-probabilities are in one message, up to 168 bytes each

FinalReason = Literal["stop", "length"]  # of a stream that is whole
EndReason = Literal[
    "stop",  # EOS
    "length",  # max_tokens or the context length
    "preempted",  # memory went to an older request: place it again; no failure
    "draining",  # the worker shuts down: place it again; no failure
    "expired",  # held KV's lease ran out: place it again; no failure
    "transfer_failed",  # twice: a failure
    "prefill_lost",  # the data-plane peer is gone: a failure
    "deadline",  # the request's own deadline passed in a queue
    "error",  # the engine failed on it: a failure
    "grammar",  # its grammar can't be followed, on no worker: the request ends
]


class End(Message, frozen=True):
    """The end of one stream on one worker. It is repeated until `EndAck`."""

    stream_id: U32
    index: U32  # generated index that would have come next
    reason: EndReason
    detail: Text = ""


class Spent(Message, frozen=True):
    """Where the time of one stream went on one worker, until the first token that it drew itself."""

    stream_id: U32
    waiting_s: Seconds  # until it was computed here, or its KV was fetched
    computing_s: Seconds = 0.0  # the text, its first token drawn at the end
    fetching_s: Seconds = 0.0  # from Fetch to the verified manifest
    step_s: Seconds = 0.0  # after a fetch: until the first token


class LogprobColumns(Message, frozen=True):
    """Log-probabilities of some rows of other columns, as little-endian columns of its own.

    rows           u32 [num_rows]              which rows, rising
    counts         u32 [num_rows]              best tokens told of each row
    top_tokens     u32 [sum(counts)]           the best tokens, best first, row after row
    logprobs       f32 [num_rows + sum(counts)]  of each row: the drawn token's, then the best tokens'
    """

    rows: Tokens
    counts: Tokens
    top_tokens: Tokens
    logprobs: Tokens


class PromptLogprobColumns(Message, frozen=True):
    """Log-probabilities of a run of one prompt's tokens, as little-endian columns.

    ranks          u32 [num_tokens]                 as in `kvferry.wire.logprobs.PromptLogprobs`, and so the others
    top_tokens     u32 [num_tokens, num_top]
    logprobs       f32 [num_tokens, 1 + num_top]
    """

    stream_id: U32
    start: Annotated[int, Meta(ge=1, le=(1 << 32) - 1)]  # position of the first of these tokens
    ranks: Tokens
    top_tokens: Tokens
    logprobs: Tokens


class TokenBatch(Message, frozen=True, tag="tokens"):
    """Worker -> gateway, one per step: the new tokens of all that gateway's sequences, as columns.

    `stream_ids`, `indices` and `tokens` are little-endian u32 columns of equal length, one row per token.
    `index` counts the generated tokens of the choice over all attempts. A gap in `batch_seq`
    (per worker incarnation and gateway) makes the gateway ask `Resend`.
    """

    incarnation: U64
    batch_seq: U32
    stream_ids: Tokens
    indices: Tokens
    tokens: Tokens
    ends: Annotated[tuple[End, ...], Meta(max_length=MAX_ROWS)] = ()
    cached: Annotated[tuple[tuple[U32, U32], ...], Meta(max_length=MAX_ROWS)] = ()  # (stream_id, cached tokens)
    logprobs: LogprobColumns | None = None  # of the rows whose sequences want any
    prompts: Annotated[tuple[PromptLogprobColumns, ...], Meta(max_length=MAX_SCORED_ROWS)] = ()
    spent: Annotated[tuple[Spent, ...], Meta(max_length=MAX_ROWS)] = ()  # of streams whose first own token is here
