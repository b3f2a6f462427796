"""One full sample of every message, every optional field set, and the codec that carries it.

`python tests/unit/wire/samples.py` records the bytes of messages that `golden_v1.json` lacks. Recorded bytes
are never changed: what version 1 once wrote, later versions read. When a message gets another field, its bytes
so far move to a name of their own (`OLDER`), and the longer ones are recorded under the message's.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from kvferry.wire import flow
from kvferry.wire.beats import ExitNotice, GatewayHeartbeat, Heartbeat, Held, Load
from kvferry.wire.cache_news import CacheEvents, CacheSnapshot
from kvferry.wire.codec import Codec, Message
from kvferry.wire.fields import pack_tokens
from kvferry.wire.logprobs import PromptLogprobs, TokenLogprobs, pack_logprobs, pack_prompt_logprobs
from kvferry.wire.messages import Codecs
from kvferry.wire.orders import CacheResync, Cancel, Drain, EndAck, Fence, Ping, Pong, Resend
from kvferry.wire.record import WorkerAddress, WorkerRecord
from kvferry.wire.sampling import Grammar, Sampling, Scoring
from kvferry.wire.tokens import End, Spent, TokenBatch
from kvferry.wire.work import Accepted, DecodeRequest, PrefillRequest, Rejected, TraceContext, Work

GOLDEN = Path(__file__).with_name("golden_v1.json")
TICKET = bytes(range(16))
INCARNATION = 0xFEED_FACE_CAFE_F00D
U32_MAX = (1 << 32) - 1

WORK = Work(
    gateway="kvferry.c1.gateway.g0.00000000000000aa",
    gateway_incarnation=0xAA,
    ticket=TICKET,
    attempt=7,
    stream_id=U32_MAX,
    choice=1,
    request_id="req-é",
    model="smollm2",
    prompt=pack_tokens([1, 2, 49151]),
    generated=pack_tokens([3]),
    sampling=Sampling(
        0.7,
        0.9,
        40,
        0.05,
        (1 << 64) - 1,
        128,
        True,
        -0.5,
        1.5,
        1.25,
        ((5, -100.0), (6, 2.5)),
        3,
        (7, 8),
        (9,),
        20,
        Grammar("json", '{"type": "object", "title": "é"}', 5),
    ),
    priority=-1,
    arrival=1234.5,
    salt=bytes(16),
    alone=True,
    deadline=2.5,
    scoring=Scoring(20, 7),
    trace=TraceContext(bytes(range(16)), bytes(range(8)), "vendor=1"),
)
PROMPT_LOGPROBS = pack_prompt_logprobs(
    6,
    PromptLogprobs(
        3, np.array([1], np.uint32), np.array([[49151, 7]], np.uint32), np.array([[-0.5, -0.5, -1.25]], "f4")
    ),
)
LOGPROBS = pack_logprobs([(1, TokenLogprobs(-0.5, (49151, 7), (-0.5, -1.25)))])
ADDRESS_BEFORE_SHARDS = WorkerAddress(INCARNATION, ("ucx://00ff", "tcp://127.0.0.1:4000"))
ADDRESS = msgspec.structs.replace(ADDRESS_BEFORE_SHARDS, heads=((0, 2), (2, 3)))
RECORD = WorkerRecord(
    role="decode",
    name="d0",
    incarnation=INCARNATION,
    pid=4242,
    subject="kvferry.c1.decode.d0.feedfacecafef00d",
    model="smollm2",
    transport="ucx",
    address=ADDRESS,
    kv_format_id="kv-1",
    numerics_id="num-1",
    max_model_len=8192,
    block_size=16,
    num_blocks=1000,
    kv_token_bytes=23040,
    debug_port=9001,
    exact=True,
    engine="native",
    engine_reason="asked for",
    grammars=True,
    kv_dtype="bfloat16",
    vocabulary_id="vocabulary-1",
    features=("scoring", "a later one"),
    ranks=4,
)
LOAD = Load(1, 2, 3, 4, 1500.5, 0.0125, 99, 12, (0, 1, 2), ((0xBB, 1 << 20, 0.5),), {"free": 4, "a later one": 2})
HELD = Held(5, "computing", 17, 40, 512, 2048)

TO_WORKER: list[Message] = [
    PrefillRequest(WORK),
    DecodeRequest(WORK, ADDRESS),
    Cancel(TICKET, 7),
    Fence(INCARNATION, 0xAA, 6),
    Resend(0xAA, ((5, 17), (6, 0)), ((6, 3),)),
    EndAck(0xAA, (5, 6), (6,)),
    Ping(INCARNATION),
    Drain(INCARNATION),
    CacheResync(INCARNATION),
]
TO_GATEWAY: list[Message] = [
    TokenBatch(
        INCARNATION,
        3,
        pack_tokens([5, 6]),
        pack_tokens([17, 0]),
        pack_tokens([100, 49151]),
        (End(5, 18, "stop", "EOS"),),
        ((6, 16),),
        LOGPROBS,
        (PROMPT_LOGPROBS,),
        (Spent(5, 0.25, 0.5, 0.125, 0.0625),),
    ),
]
ANSWERS: list[Message] = [
    Accepted(TICKET, 7),
    Rejected(TICKET, 7, "queue_full", 0.5),
    Pong(INCARNATION, INCARNATION),
]
BEATS: list[Message] = [
    Heartbeat(8, "ready", RECORD, LOAD, {"kvferry.c1.gateway.g0.00000000000000aa": (HELD,)}),
    GatewayHeartbeat(9, "g0", 0xAA, "kvferry.c1.gateway.g0.00000000000000aa", 4243, ((INCARNATION, (5, 6)),)),
    ExitNotice(INCARNATION, "crashed"),
]
CACHE_NEWS: list[Message] = [
    CacheEvents(INCARNATION, (1 << 64) - 1, bytes(range(16)), bytes(range(8))),
    CacheSnapshot(INCARNATION, 5, 1, 2, bytes(range(24))),
]
FLOW: list[Message] = [
    flow.Hello(INCARNATION, TICKET),
    flow.Prove(bytes(range(32))),
    flow.Open(1, TICKET, 7),
    flow.Unknown(1),
    flow.Progress(1, True, 512, 2048, 0.25),
    flow.Fetch(1, 16, 8, (0, 2)),
    flow.FetchPart(1, TICKET, 7, 16, 8, (2, 3)),
    flow.Credit(1, 2, (3, 4)),
    flow.Abort(1),
    flow.Aborted(1, 9, "expired"),
    flow.Ack(1),
]
MANIFESTS: list[Message] = [flow.Manifest(4, "kv-1", TICKET, TICKET[::-1], ((0, 42), (1, 43)), 16, 0.004, LOGPROBS)]


BEFORE_SCORING = msgspec.structs.replace(WORK, scoring=None, trace=None)
BEFORE_GRAMMARS = msgspec.structs.replace(BEFORE_SCORING, sampling=msgspec.structs.replace(WORK.sampling, grammar=None))
BEFORE_LOGIT_BIAS = msgspec.structs.replace(
    BEFORE_GRAMMARS,
    sampling=msgspec.structs.replace(
        BEFORE_GRAMMARS.sampling, logit_bias=(), min_tokens=0, stop_token_ids=(), banned=(), num_logprobs=None
    ),
)
BEFORE_PENALTIES = msgspec.structs.replace(
    BEFORE_LOGIT_BIAS,
    sampling=msgspec.structs.replace(
        BEFORE_LOGIT_BIAS.sampling, presence_penalty=0.0, frequency_penalty=0.0, repetition_penalty=1.0
    ),
)
BATCH_BEFORE_TIMES = msgspec.structs.replace(TO_GATEWAY[0], spent=())
BEFORE_LOGPROBS = (
    msgspec.structs.replace(BATCH_BEFORE_TIMES, logprobs=None, prompts=()),
    msgspec.structs.replace(MANIFESTS[0], logprobs=None),
)
LOAD_BEFORE_BLOCKS = msgspec.structs.replace(LOAD, blocks={})
BEFORE_CACHE_NEWS = msgspec.structs.replace(LOAD_BEFORE_BLOCKS, cache_seq=0, queued_tokens=(), pulls=())
RECORD_BEFORE_SHARDS = msgspec.structs.replace(RECORD, address=ADDRESS_BEFORE_SHARDS)
RECORD_BEFORE_RANKS = msgspec.structs.replace(RECORD_BEFORE_SHARDS, ranks=1)
RECORD_BEFORE_SCORING = msgspec.structs.replace(RECORD_BEFORE_RANKS, kv_dtype="", vocabulary_id="", features=())
RECORD_BEFORE_GRAMMARS = msgspec.structs.replace(RECORD_BEFORE_SCORING, grammars=False)
HELD_BEFORE_PROGRESS = Held(5, "running", 17, 40)
HELD_BEFORE_SCORING = msgspec.structs.replace(HELD_BEFORE_PROGRESS, next_scored=0)
BEFORE_EXACT = msgspec.structs.replace(RECORD_BEFORE_GRAMMARS, exact=False, engine="", engine_reason="")
OLDER: dict[str, tuple[Codec[Any], Message]] = {  # what senders of version 1 wrote before a field was appended
    "DecodeRequest before shards": (Codecs().to_worker, DecodeRequest(WORK, ADDRESS_BEFORE_SHARDS)),
    "Fetch before shards": (flow.FlowCodec(), flow.Fetch(1, 16, 8)),
    "Heartbeat before shards": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD_BEFORE_SHARDS,
            LOAD_BEFORE_BLOCKS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_PROGRESS,)},
        ),
    ),
    "Heartbeat before blocks": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD,
            LOAD_BEFORE_BLOCKS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_PROGRESS,)},
        ),
    ),
    "TokenBatch before times": (Codecs().to_gateway, BATCH_BEFORE_TIMES),
    "PrefillRequest before scoring": (Codecs().to_worker, PrefillRequest(BEFORE_SCORING)),
    "DecodeRequest before scoring": (Codecs().to_worker, DecodeRequest(BEFORE_SCORING, ADDRESS_BEFORE_SHARDS)),
    "Resend before scoring": (Codecs().to_worker, Resend(0xAA, ((5, 17), (6, 0)))),
    "EndAck before scoring": (Codecs().to_worker, EndAck(0xAA, (5, 6))),
    "TokenBatch before scoring": (
        Codecs().to_gateway,
        msgspec.structs.replace(BATCH_BEFORE_TIMES, prompts=()),
    ),
    "Heartbeat before scoring": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD_BEFORE_SCORING,
            LOAD_BEFORE_BLOCKS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_SCORING,)},
        ),
    ),
    "Heartbeat before ranks": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD_BEFORE_RANKS,
            LOAD_BEFORE_BLOCKS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_PROGRESS,)},
        ),
    ),
    "PrefillRequest before penalties": (Codecs().to_worker, PrefillRequest(BEFORE_PENALTIES)),
    "DecodeRequest before penalties": (Codecs().to_worker, DecodeRequest(BEFORE_PENALTIES, ADDRESS_BEFORE_SHARDS)),
    "PrefillRequest before logit_bias": (Codecs().to_worker, PrefillRequest(BEFORE_LOGIT_BIAS)),
    "DecodeRequest before logit_bias": (
        Codecs().to_worker,
        DecodeRequest(BEFORE_LOGIT_BIAS, ADDRESS_BEFORE_SHARDS),
    ),
    "TokenBatch before logprobs": (Codecs().to_gateway, BEFORE_LOGPROBS[0]),
    "Manifest before logprobs": (flow.ManifestCodec(), BEFORE_LOGPROBS[1]),
    "Heartbeat before exact": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            BEFORE_EXACT,
            BEFORE_CACHE_NEWS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_SCORING,)},
        ),
    ),
    "Heartbeat before cache news": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD_BEFORE_GRAMMARS,
            BEFORE_CACHE_NEWS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_SCORING,)},
        ),
    ),
    "PrefillRequest before grammars": (Codecs().to_worker, PrefillRequest(BEFORE_GRAMMARS)),
    "DecodeRequest before grammars": (Codecs().to_worker, DecodeRequest(BEFORE_GRAMMARS, ADDRESS_BEFORE_SHARDS)),
    "Heartbeat before grammars": (
        Codecs().beat,
        Heartbeat(
            8,
            "ready",
            RECORD_BEFORE_GRAMMARS,
            LOAD_BEFORE_BLOCKS,
            {"kvferry.c1.gateway.g0.00000000000000aa": (HELD_BEFORE_SCORING,)},
        ),
    ),
}


def carried() -> list[tuple[Codec[Any], Message]]:
    """Every sample with the codec of its union."""
    codecs = Codecs()
    return [
        *((codecs.to_worker, sample) for sample in TO_WORKER),
        *((codecs.to_gateway, sample) for sample in TO_GATEWAY),
        *((codecs.answer, sample) for sample in ANSWERS),
        *((codecs.beat, sample) for sample in BEATS),
        *((codecs.cache, sample) for sample in CACHE_NEWS),
        *((flow.FlowCodec(), sample) for sample in FLOW),
        *((flow.ManifestCodec(), sample) for sample in MANIFESTS),
    ]


def name(sample: Message) -> str:
    return type(sample).__name__


def record() -> None:
    known: dict[str, str] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    fresh = {name(sample): codec.encode(sample).hex() for codec, sample in carried() if name(sample) not in known}
    GOLDEN.write_text(json.dumps(known | fresh, indent=2) + "\n")


if __name__ == "__main__":
    record()
