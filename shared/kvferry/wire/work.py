"""What a gateway asks of workers, and what they answer.

ticket       16 random bytes, one for each (unit, attempt)
attempt      u32, counted per gateway and never reused, so that one number fences all older placements
stream_id    u32 that a gateway gives each (request, choice, attempt)
incarnation  u64 drawn at each process start
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from msgspec import Meta

from kvferry.wire.codec import Message
from kvferry.wire.fields import U32, U64, Name, Seconds, Ticket, Tokens
from kvferry.wire.record import WorkerAddress
from kvferry.wire.sampling import Sampling, Scoring

NUM_PRIORITY_CLASSES: Final = 3
MAX_TRACE_STATE_CHARS: Final = 512  # of W3C's `tracestate`; longer ones are not passed on


def priority_class(priority: int) -> int:
    """0 urgent (below 0), 1 normal, 2 background: lower numbers go first."""
    return 0 if priority < 0 else 1 if priority == 0 else 2


class TraceContext(Message, frozen=True):
    """A span of a trace that is recorded, for spans of others to go under (W3C Trace Context)."""

    trace_id: Annotated[bytes, Meta(min_length=16, max_length=16)]
    span_id: Annotated[bytes, Meta(min_length=8, max_length=8)]
    state: Annotated[str, Meta(max_length=MAX_TRACE_STATE_CHARS)] = ""  # `tracestate`, as the client sent it


class Work(Message, frozen=True):
    """One attempt at one unit: what both workers of a pair are asked to do."""

    gateway: Name  # bus subject that answers and tokens go to
    gateway_incarnation: U64
    ticket: Ticket
    attempt: U32
    stream_id: U32
    choice: U32
    request_id: Name  # label for logs, never a key
    model: Name
    prompt: Tokens
    generated: Tokens
    sampling: Sampling
    priority: int
    arrival: float  # ordering key: (priority, arrival, ticket)
    salt: Annotated[bytes, Meta(max_length=32)]  # root of the prefix cache's hash chain
    alone: bool = False  # runs in steps of its own: its last two workers crashed under it
    deadline: Seconds | None = None  # seconds left
    unit: U64 = 0  # gateway's number of the unit: a newer attempt at it cancels older ones on a worker
    scoring: Scoring | None = None  # None: nobody asks how likely the prompt is, or the gateway knows by now
    trace: TraceContext | None = None  # the span of the attempt; None: nobody records it

    @property
    def key(self) -> tuple[bytes, int]:
        return (self.ticket, self.attempt)

    @property
    def order(self) -> tuple[int, float, bytes]:
        """Oldest first. Unchanged by re-placement only up to the ticket, which breaks ties."""
        return (self.priority, self.arrival, self.ticket)


class PrefillRequest(Message, frozen=True, tag="prefill"):
    """Gateway -> P, answered `Accepted` or `Rejected`. Idempotent by (ticket, attempt)."""

    work: Work


class DecodeRequest(Message, frozen=True, tag="decode"):
    """Gateway -> D, answered `Accepted` or `Rejected`. Without `prefill`, D computes the prompt itself."""

    work: Work
    prefill: WorkerAddress | None = None


RejectReason = Literal[
    "queue_full", "draining", "wrong_model", "too_long", "stale_attempt", "cancelled", "not_ready", "malformed"
]


class Accepted(Message, frozen=True, tag="accepted"):
    ticket: Ticket
    attempt: U32


class Rejected(Message, frozen=True, tag="rejected"):
    ticket: Ticket
    attempt: U32
    reason: RejectReason
    retry_after: Seconds = 1.0
