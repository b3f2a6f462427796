"""Messages of the control plane (NATS). Who sends what to whom stands in `docs/protocol.md`.

Ids:
    ticket       16 random bytes, one for each (unit, attempt)
    attempt      u32, counted per gateway and never reused, so that one number fences all older placements
    stream_id    u32 that a gateway gives each (request, choice, attempt)
    incarnation  u64 drawn at each process start
Token ids travel as little-endian u32 in a `bin` field. Durations are seconds; no instant crosses
the wire but `arrival`, which is only an ordering key.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from kvferry.wire.codec import Codec, Message

MAX_TOKEN_BYTES: Final = 4 * (1 << 20)
MAX_NAME_CHARS: Final = 128
MAX_ROWS: Final = 1 << 16
MAX_SHARDS: Final = 64
MAX_REPETITION_PENALTY: Final = 100
MAX_LOGPROBS: Final = 20  # best tokens told beside a drawn one
MAX_LOGIT_BIAS: Final = 1024  # entries of one request
MAX_TOKEN_LIST: Final = 1024  # stop tokens, or banned tokens, of one request
MAX_GRAMMAR_CHARS: Final = 1 << 17  # of a grammar's source
MAX_TRACE_STATE_CHARS: Final = 512  # of W3C's `tracestate`; longer ones are not passed on
NUM_PRIORITY_CLASSES: Final = 3
MAX_RECENT_PULLS: Final = 32  # in one heartbeat
MAX_SCORED_ROWS: Final = 512  # tokens of prompts whose log-probabilities are in one message, up to 168 bytes each
MAX_FEATURES: Final = 64  # of one worker

U16 = Annotated[int, Meta(ge=0, le=(1 << 16) - 1)]
U32 = Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
# msgpack integers reach 2**64 - 1, msgspec's bounds only 2**63 - 1: the lower bound is enough here.
U64 = Annotated[int, Meta(ge=0)]
Ticket = Annotated[bytes, Meta(min_length=16, max_length=16)]
Tokens = Annotated[bytes, Meta(max_length=MAX_TOKEN_BYTES)]
Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
Text = Annotated[str, Meta(max_length=1024)]
Seconds = Annotated[float, Meta(ge=0)]
Count = Annotated[int, Meta(ge=0, le=1 << 40)]

TokenArray: TypeAlias = npt.NDArray[np.uint32]
Role = Literal["gateway", "prefill", "decode"]
WORKER_ROLES: Final = ("prefill", "decode")


def priority_class(priority: int) -> int:
    """0 urgent (below 0), 1 normal, 2 background: lower numbers go first."""
    return 0 if priority < 0 else 1 if priority == 0 else 2


def pack_tokens(tokens: TokenArray | list[int] | tuple[int, ...]) -> bytes:
    return np.asarray(tokens, dtype="<u4").tobytes()


def unpack_tokens(column: bytes) -> TokenArray:
    """Read-only view, u32 [num_tokens]. The caller has checked that the length is a multiple of 4."""
    return np.frombuffer(column, dtype="<u4")


GrammarKind = Literal["json", "regex", "choice", "grammar", "tagged"]


class Grammar(Message, frozen=True):
    """What the text of a choice must be. Each worker follows it from the source and the generated tokens alone.

    json     a JSON Schema
    regex    a regular expression (Rust's syntax) that the whole text matches
    choice   a JSON list of the texts that may be
    grammar  context-free: Lark as llguidance has it, or GBNF
    tagged   free text with parts that follow a schema: JSON of {"lark": Lark, "schemas": {name that it uses: schema}}
    """

    kind: GrammarKind
    source: Annotated[str, Meta(max_length=MAX_GRAMMAR_CHARS)]
    after: U32 | None = None  # the grammar begins behind the first of this token in the generated text


class Sampling(Message, frozen=True):
    """How the tokens of one sequence are drawn and when they end."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Count = 0  # 0: no limit
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    seed: U64 = 0
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 32)] = 16  # of the whole choice, over all attempts; 0: only scored
    ignore_eos: bool = False
    # As in vLLM: the first two count generated tokens, the last one looks at the prompt too.
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=MAX_REPETITION_PENALTY)] = 1.0
    logit_bias: Annotated[
        tuple[tuple[U32, Annotated[float, Meta(ge=-100, le=100)]], ...], Meta(max_length=MAX_LOGIT_BIAS)
    ] = ()  # (token, what is added to its logit)
    min_tokens: Count = 0  # of the whole choice: until then nothing that ends it is drawn
    stop_token_ids: Annotated[tuple[U32, ...], Meta(max_length=MAX_TOKEN_LIST)] = ()  # end it, beside EOS
    banned: Annotated[tuple[U32, ...], Meta(max_length=MAX_TOKEN_LIST)] = ()  # never drawn
    num_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None  # None: no log-probability wanted
    grammar: Grammar | None = None  # None: any text

    @property
    def penalised(self) -> bool:
        """Whether a draw depends on which tokens came before it, apart from the model."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)

    @property
    def ends_at_eos(self) -> bool:
        """A grammar lets EOS be drawn only where it may end."""
        return not self.ignore_eos or self.grammar is not None

    def is_end(self, token: int, eos_token_ids: frozenset[int]) -> bool:
        """Whether a drawn token is the last one by what it is."""
        return (self.ends_at_eos and token in eos_token_ids) or token in self.stop_token_ids

    def banned_at(self, index: int, eos_token_ids: frozenset[int]) -> tuple[int, ...]:
        """What must not be drawn at a generated index, ends of the choice among it before `min_tokens`."""
        early = index < self.min_tokens
        # With a grammar EOS is only kept away while that has anything else: see `Draw.allowed`.
        no_eos = (early and not self.ignore_eos) if self.grammar is None else (early or self.ignore_eos)
        if not early and not no_eos:
            return self.banned
        return (*self.banned, *(sorted(eos_token_ids) if no_eos else ()), *(self.stop_token_ids if early else ()))


class Scoring(Message, frozen=True):
    """Log-probabilities of the prompt's own tokens are wanted, from whoever computes the prompt."""

    num_top: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]  # best tokens told beside each one
    start: Annotated[int, Meta(ge=1, le=(1 << 32) - 1)] = 1  # position of the first token that lacks them


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


class WorkerAddress(Message, frozen=True):
    """Where the shards of a worker listen on the data plane, rank by rank."""

    incarnation: U64
    shards: Annotated[tuple[Annotated[str, Meta(max_length=2048)], ...], Meta(max_length=MAX_SHARDS)]


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


# What a worker of an older version would pass over in silence, or not understand.
Feature = Literal["scoring", "tagged"]


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


class Held(Message, frozen=True):
    """One sequence of one gateway on this worker."""

    stream_id: U32
    state: SequenceState
    next_index: U32
    next_scored: U32 = 0  # position behind the prompt's last token whose log-probabilities were sent; 0: none were


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


class CacheResync(Message, frozen=True, tag="cache_resync"):
    """Gateway -> worker: cache events were lost; publish a snapshot."""

    worker_incarnation: U64


ToWorker = PrefillRequest | DecodeRequest | Cancel | Fence | Resend | EndAck | Ping | Drain | CacheResync
ToGateway = TokenBatch
Answer = Accepted | Rejected | Pong
Beat = Heartbeat | GatewayHeartbeat | ExitNotice
CacheNews = CacheEvents | CacheSnapshot


class Codecs:
    """The codecs of the control plane. One instance per event loop."""

    def __init__(self) -> None:
        self.to_worker: Codec[ToWorker] = Codec(ToWorker)
        self.to_gateway: Codec[ToGateway] = Codec(ToGateway)
        self.answer: Codec[Answer] = Codec(Answer)
        self.beat: Codec[Beat] = Codec(Beat)
        self.cache: Codec[CacheNews] = Codec(CacheNews)
