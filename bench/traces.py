"""Request traces of public services, as placement sees them: when, how long, which blocks.

KVFERRY_TRACES names a folder with the files as they were published:

    mooncake_conversation.jsonl    Mooncake, conversations: arrival, lengths, prefix-chained ids of blocks of 512
    azure_2023_conversation.csv    Azure LLM inference 2023, conversations: arrival and lengths, no content
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from kvferry_local.bench.trace import read_trace

TRACES_VARIABLE: Final = "KVFERRY_TRACES"
MOONCAKE: Final = "mooncake_conversation.jsonl"
AZURE: Final = "azure_2023_conversation.csv"
BLOCK_SIZE: Final = 32  # tokens
MOONCAKE_DIVISOR: Final = 16  # of lengths: blocks of 512 tokens become 32
MOONCAKE_TICK_S: Final = 3.0  # its timestamps are multiples of this


@dataclass(frozen=True, slots=True)
class TraceRequest:
    arrival: float  # seconds from the start
    prompt_tokens: int
    output_tokens: int
    keys: tuple[int, ...] = ()  # of the prompt's full blocks; equal keys, equal prefixes


def folder() -> Path:
    """Raises LookupError if it is not named, FileNotFoundError if it is not there."""
    named = os.environ.get(TRACES_VARIABLE)
    if not named:
        raise LookupError(f"set {TRACES_VARIABLE} to the folder of traces")
    path = Path(named)
    if not path.is_dir():
        raise FileNotFoundError(f"{TRACES_VARIABLE}: {path} is no folder")
    return path


def mooncake(path: Path) -> list[TraceRequest]:
    requests = []
    for row in read_trace(path / MOONCAKE):
        full = row.prompt_tokens // (BLOCK_SIZE * MOONCAKE_DIVISOR)
        prompt, output = (max(1, length // MOONCAKE_DIVISOR) for length in (row.prompt_tokens, row.output_tokens))
        requests.append(TraceRequest(row.at, prompt, output, row.blocks[:full]))
    return requests


def azure(path: Path) -> list[TraceRequest]:
    """Without block ids: nothing is known to be shared."""
    rows = read_trace(path / AZURE)
    return [TraceRequest(row.at - rows[0].at, row.prompt_tokens, row.output_tokens) for row in rows]


def excerpt(trace: list[TraceRequest], count: int, seed: int) -> list[TraceRequest]:
    """`count` requests in a row from a place that the seed draws, from time 0 on, spread over each tick.

    Bursts and the order of requests stay; only where within its tick one arrives is drawn.
    """
    draw = random.Random(seed)
    first = draw.randrange(max(1, len(trace) - count))
    chosen = trace[first : first + count]
    ticked = all(request.arrival % MOONCAKE_TICK_S == 0 for request in chosen)
    start = chosen[0].arrival
    moved = [
        replace(request, arrival=request.arrival - start + (draw.random() * MOONCAKE_TICK_S if ticked else 0.0))
        for request in chosen
    ]
    return sorted(moved, key=lambda request: request.arrival)


def scaled(requests: list[TraceRequest], rate: float) -> list[TraceRequest]:
    """The same requests at `rate` a second on average."""
    factor = len(requests) / rate / max(1e-9, requests[-1].arrival)
    return [replace(request, arrival=request.arrival * factor) for request in requests]
