"""What is promised, row by row, and where each figure is found: the tables of `docs/performance.md`.

A row that nobody has measured yet stays in its table, without a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final


@dataclass(frozen=True, slots=True)
class Target:
    """`figure` is a pattern (fnmatch) of the figure's name in the results of `benchmark`."""

    benchmark: str
    figure: str
    what: str
    limit: float | None  # None: the one that was measured in the same run
    at_least: bool = False
    unit: str = ""

    def names(self, figure: str) -> bool:
        return fnmatchcase(figure, self.figure)


@dataclass(frozen=True, slots=True)
class Section:
    title: str
    text: str
    benchmarks: tuple[str, ...]
    targets: tuple[Target, ...] = ()
    picture: str = ""  # of `page_pictures.PICTURES`


def _reach(benchmark: str, figure: str, what: str, limit: float | None) -> Target:
    return Target(benchmark, figure, what, limit, at_least=True)


def _stay(benchmark: str, figure: str, what: str, limit: float | None, unit: str = "") -> Target:
    return Target(benchmark, figure, what, limit, unit=unit)


RIVALS: Final = Section(
    "Beside llama.cpp and vLLM",
    "SmolLM2-135M in BF16 unless said, over HTTP; the same cores, prompts and client for all, in interleaved rounds. "
    "Prefill counts prompt tokens over the whole time of a request that generates one token, or two where prefill and "
    "decode are apart, since the second is the first that waits for the KV. Decode counts tokens while all streams "
    "run. A lone stream reads all weights for each token: the share of the cores' read bandwidth that llama.cpp uses "
    "bounds what can be gained on it.",
    ("versus",),
    (
        _reach("versus", "single worker*: prefill 512 ÷ vLLM", "single worker, 2 cores: prefill 512 ÷ vLLM", 1.25),
        _reach("versus", "single worker*: prefill 2048 ÷ vLLM", "single worker, 2 cores: prefill 2,048 ÷ vLLM", 1.25),
        _reach(
            "versus", "single worker*: decode 1 stream ÷ llama.cpp",
            "single worker, 2 cores: decode 1 stream ÷ llama.cpp", 1.3,
        ),
        _reach(
            "versus", "single worker*: decode 8 streams ÷ the better*",
            "single worker, 2 cores: decode 8 streams ÷ the better of both", 2.5,
        ),
        _reach(
            "versus", "int8*: decode 1 stream ÷ llama.cpp Q8_0", "int8, 2 cores: decode 1 stream ÷ llama.cpp Q8_0", 2.0
        ),
        _reach(
            "versus", "1 + 1 cores: prefill 2048 ÷ vLLM P/D", "1 + 1 cores: prefill 2,048 ÷ vLLM P/D with NIXL", 1.4
        ),
        _reach(
            "versus", "1 + 1 cores: decode 8 streams ÷ vLLM P/D",
            "1 + 1 cores: decode 8 streams ÷ vLLM P/D with NIXL", 2.3,
        ),
        _stay(
            "versus", "worst gap per arrival ÷ vLLM's",
            "1 + 1 cores: worst gap per arriving prompt ÷ vLLM's with 256-token chunks on 2 cores", 0.15,
        ),
    ),
    "versus",
)  # fmt: skip

SERVING: Final = Section(
    "A recorded load",
    "Conversations as Azure served them, shortened to what two cores can do, played by `kvferry bench` on each server "
    "in turn: requests come when they came, whether or not those before have been answered. Goodput is the share of "
    "them with TTFT ≤ 1 s and TPOT ≤ 50 ms.",
    ("serving",),
    picture="serving",
)

MACHINE: Final = Section(
    "In process, against the machine",
    "The native engine alone, beside what the same core does in the same run: bf16 multiply-adds that stay in "
    "registers, and reading memory. Prefill counts 2 FLOP per parameter and token without the embedding, causal "
    "attention, and the head for the last token; decode counts the bytes of the weights.",
    ("engine", "chunks"),
    (
        _reach(
            "engine", "native bf16, 1 thread: prefill 512 ÷ machine",
            "1 thread: prefill 512 ÷ multiply-adds in registers", 0.8,
        ),
        _reach(
            "engine", "native bf16, 1 thread: decode 1 ÷ machine", "1 thread: decode 1 stream ÷ read bandwidth", 0.8
        ),
        _reach("engine", "native bf16: prefill 512, 2 threads ÷ 1", "prefill 512, 2 threads ÷ 1", 1.7),
        _stay(
            "chunks", "longest step of more than a block", "longest step of prefill, at up to 32k of context", 450, "ms"
        ),
    ),
    "engine",
)  # fmt: skip

ISAS: Final = Section(
    "What an instruction set is worth",
    "The same engine on one thread, built for each instruction set of one processor, in turn; beside torch, whose "
    "oneDNN takes the best that it knows. On `amx`, products run on tile registers.",
    ("isas",),
)

TOKEN_TIME: Final = Section(
    "Where the time of a token goes",
    "A single worker on all cores, over HTTP. What its step takes beyond the engine alone is the way to the engine's "
    "thread and back, on caches that the weights have swept, and what gateway, NATS and client take of the same cores; "
    "what a token takes beyond its step is the loop between two of them. No step is shorter than reading the weights.",
    ("token_time",),
)

MEMORY: Final = Section(
    "Memory of a worker",
    "A worker on the native engine under load, its KV pool and staging slots all in use.",
    ("memory",),
    (
        _stay("memory", "*: RSS − weights − KV pool − staging", "RSS − weights − KV pool − staging", 350, "MB"),
        _stay("memory", "weights ÷ the checkpoint's", "weights ÷ the checkpoint's: one copy of the embedding", 1.05),
    ),
)

ACCURACY: Final = Section(
    "Accuracy",
    "Teacher forcing over this project's documents, against transformers in fp32. The limits of bf16 are what "
    "transformers' own bf16 costs.",
    ("accuracy",),
    (
        _stay("accuracy", "native bf16: mean logit error", "bf16: mean logit error", None),
        _reach("accuracy", "native bf16: same most likely token", "bf16: same most likely token", None),
        _stay("accuracy", "native bf16: perplexity", "bf16: perplexity", None),
        _stay("accuracy", "native int8: mean logit error", "int8: mean logit error", None),
        _reach("accuracy", "native int8: same most likely token", "int8: same most likely token", None),
        _stay("accuracy", "native int8: perplexity", "int8: perplexity", None),
    ),
)

HANDOFF: Final = Section(
    "The hand-off",
    "From the accepted request to the sequence that may run: gather, checksum, transfer, check, scatter, and every "
    "round trip. What it costs a client shows in the time to the second token; the first does not wait for the KV.",
    ("transport", "handoff", "handoff_cost"),
    (
        _reach("transport", "ucx ÷ ucx_perftest tag_bw", "UCX alone ÷ ucx_perftest", 0.8),
        _reach("transport", "tcp ÷ *", "TCP alone ÷ bare sockets", 0.9),
        _reach("handoff", "ucx: whole hand-off ÷ transport", "UCX: whole hand-off ÷ transport", 0.5),
        _reach("handoff", "tcp: whole hand-off ÷ transport", "TCP: whole hand-off ÷ transport", 0.5),
        _stay(
            "handoff_cost", "2048 tokens: cost of the hand-off",
            "2,048 tokens: second token later than a single worker's, share of its time", 0.03,
        ),
        _stay(
            "handoff_cost", "512 tokens: cost of the hand-off",
            "512 tokens: second token later than a single worker's, share of its time", 0.05,
        ),
        _stay(
            "handoff_cost", "2048 tokens: tail of the hand-off ÷ prefill time",
            "2,048 tokens: last layer computed to sequence runnable ÷ prefill time", 0.03,
        ),
    ),
)  # fmt: skip

RANKS: Final = Section(
    "Ranks",
    "Workers of one and of two ranks on the native engine, a thread each. Every output is summed by one rank, in the "
    "order of a model that is whole, so that all degrees have the same bits: what two exchanges more in a layer cost "
    "is set against the step that they are a part of.",
    ("ranks",),
    (
        _stay("ranks", "hand-off of *, 1 to 2 ÷ 1 to 1", "hand-off from 1 rank to 2 ÷ 1 to 1", 1.15),
        _stay("ranks", "hand-off of *, 2 to 1 ÷ 1 to 1", "hand-off from 2 ranks to 1 ÷ 1 to 1", 1.15),
        _stay(
            "ranks", "one order at every degree, decode 1: share of a step",
            "one order of summation at every degree, share of a decode step", 0.1,
        ),
        _stay(
            "ranks", "one order at every degree, prefill 512: share of a step",
            "one order of summation at every degree, share of a step of 512 prompt tokens", 0.1,
        ),
    ),
)  # fmt: skip

INTERFERENCE: Final = Section(
    "Interference",
    "Four streams decode while prompts of 2,048 tokens arrive that generate 32 each: the worst gap of any stream per "
    "arrival, over the streams' p99 gap while nothing arrives.",
    ("interference",),
    (
        _stay("interference", "disaggregated: median ÷ undisturbed p99", "1 + 1 cores: median ÷ undisturbed p99", 1.5),
        _stay("interference", "disaggregated: maximum ÷ *", "1 + 1 cores: maximum ÷ undisturbed p99", 1.5),
    ),
    "interference",
)

_PER_TOKEN: Final = "CPU per token, {} streams: kvferry ÷ {}"

GATEWAY: Final = Section(
    "The gateway's own cost",
    "Before workers that compute nothing, beside Dynamo's frontend before its own mock workers and a loop that only "
    "writes as many bytes as often: user and system time of that one process, with stop strings, usage and metrics on "
    "and tracing off. What NATS takes stands beside it. Of a step for 32 streams a third is the system call of each "
    "write, which the write loop makes, too; a third is what each stream asks for (taking its token, packing its "
    "event), several times as dear as it is with warm caches, which others have swept since the last step; a third "
    "is waking up, reading and decoding. At 256 streams most are the writes; at one stream nearly all is waking up.",
    ("gateway",),
    (
        *(
            _stay("gateway", _PER_TOKEN.format(streams, whose), f"CPU per token, {streams} streams ÷ {words}", limit)
            for streams in (32, 256)
            for whose, words, limit in (("Dynamo", "Dynamo's frontend", 0.4), ("write loop", "the write loop", 1.5))
        ),
        _stay("gateway", "CPU per request: kvferry ÷ Dynamo", "CPU per request ÷ Dynamo's frontend", 1.0),
        _reach("gateway", "kvferry: flat out", "flat out, tokens per core-second", 1e6),
        _stay(
            "gateway", "kvferry: added latency, 32 streams, p99",
            "batch to client at 32 streams, p99", 1.5, "ms",
        ),
        _stay(
            "gateway", "kvferry: one request at a time, end to end",
            "a request for one token, end to end, one at a time", 3.0, "ms",
        ),
        _reach("gateway", "kvferry: events ÷ tokens, *", "events ÷ tokens, the least", 0.98),
    ),
)  # fmt: skip

TRACING: Final = Section(
    "What tracing costs",
    "The same gateway without tracing, with 1 % of the requests sampled, and with all of them, in turn. All threads of "
    "its process count, until every span has left it. Tokens have no spans, so a stream pays where it begins and ends.",
    ("tracing",),
)

PLACEMENT: Final = Section(
    "Placement",
    "Recorded traffic in simulation, at the engine's own measured rates, against other policies.",
    ("placement",),
    (
        _stay("placement", "decision, p99", "a decision with 1,000 workers and 10⁶ indexed blocks, p99", 1.0, "ms"),
        _stay("placement", "regret against every pair, mean", "regret against scoring every pair, mean", 2.0, "%"),
        _stay("placement", "heartbeats of 1,000 workers", "heartbeats of 1,000 workers", 0.2, "cores"),
    ),
    "placement",
)

STACK: Final = Section(
    "Idle, start, exactness",
    "Processor time of every process while nothing happens; the time from `make run` to ready; and disaggregated texts "
    "against a single worker's.",
    ("idle", "startup", "parity", "parity_kill"),
)

SECTIONS: Final = (
    RIVALS,
    SERVING,
    MACHINE,
    ISAS,
    TOKEN_TIME,
    MEMORY,
    ACCURACY,
    HANDOFF,
    RANKS,
    INTERFERENCE,
    GATEWAY,
    TRACING,
    PLACEMENT,
    STACK,
)
