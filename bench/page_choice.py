"""The measured tables of `docs/when-not-to-disaggregate.md`. The words around them are written by hand.

A table stands between `<!-- figures NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from bench.page_pictures import shown

CHOICE: Final = "when-not-to-disaggregate.md"


@dataclass(frozen=True, slots=True)
class Row:
    """`figure` is a pattern (fnmatch) of the figure's name in the results of `benchmark`."""

    what: str
    benchmark: str
    figure: str


TABLES: Final[Mapping[str, tuple[Row, ...]]] = {
    "gain": (
        Row("apart: p99 gap of a stream, undisturbed", "interference", "disaggregated: undisturbed p99 ITL"),
        Row("apart: worst gap per arrival, median", "interference", "disaggregated: worst gap per arrival, median"),
        Row("apart: worst gap per arrival, maximum", "interference", "disaggregated: worst gap per arrival, maximum"),
        Row("one worker: p99 gap, undisturbed", "interference", "single worker, *: undisturbed p99 ITL"),
        Row(
            "one worker, its best chunk size: worst gap per arrival, median",
            "interference", "single worker, *: worst gap per arrival, median",
        ),
        Row(
            "one worker, its best chunk size: worst gap per arrival, maximum",
            "interference", "single worker, *: worst gap per arrival, maximum",
        ),
        Row("vLLM, 256-token chunks: worst gap per arrival", "versus", "vLLM, 256-token*: worst gap per arrival"),
    ),
    "load": tuple(
        Row(f"{words}: {what}", "serving", f"{server}: {figure}")
        for words, server in (("apart", "kvferry, 1 + 1 cores"), ("one worker", "kvferry, one worker, 2 cores"))
        for what, figure in (
            ("requests within TTFT ≤ 1 s and TPOT ≤ 50 ms", "goodput"),
            ("median TTFT", "TTFT p50"),
            ("p99 TTFT", "TTFT p99"),
            ("median time of an output token", "TPOT p50"),
            ("p99 ITL", "ITL p99"),
            ("longest ITL", "ITL max"),
        )
    ),
    "prompt": (
        Row("512 tokens on one core", "engine", "native bf16, 1 thread: prefill 512"),
        Row("512 tokens on both cores", "engine", "native bf16, 2 threads: prefill 512"),
        Row("2,048 tokens on one core", "engine", "native bf16, 1 thread: prefill 2048"),
        Row("2,048 tokens on both cores", "engine", "native bf16, 2 threads: prefill 2048"),
    ),
    "handoff": (
        Row("second token after 512 tokens, single worker", "handoff_cost", "512 tokens: single worker"),
        Row("second token after 512 tokens, apart", "handoff_cost", "512 tokens: disaggregated"),
        Row("second token after 2,048 tokens, single worker", "handoff_cost", "2048 tokens: single worker"),
        Row("second token after 2,048 tokens, apart", "handoff_cost", "2048 tokens: disaggregated"),
        Row("KV per second, whole hand-off, UCX over TCP", "handoff", "ucx: whole hand-off"),
        Row("KV per second, whole hand-off, TCP", "handoff", "tcp: whole hand-off"),
    ),
    "memory": (
        Row("weights, in each worker", "memory", "weights"),
        Row("a worker beside weights, KV pool and staging", "memory", "decode-0: RSS − weights*"),
    ),
}  # fmt: skip


def filled(text: str, results: Mapping[str, Mapping[str, Any]]) -> str:
    """`text` with every marked table as the results have it."""
    for name, rows in TABLES.items():
        table = "\n".join(("| figure | value |", "|---|---|", *(_line(row, results) for row in rows)))
        mark = re.compile(rf"(<!-- figures {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = mark.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)  # type: ignore[misc]  # a default in a lambda has no type
    return text


def _line(row: Row, results: Mapping[str, Mapping[str, Any]]) -> str:
    value = next(_values(row, results), f"not yet measured: `python -m bench {row.benchmark}`")
    return f"| {row.what} | {value} |"


def _values(row: Row, results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for figure in results.get(row.benchmark, {"figures": ()})["figures"]:
        if fnmatchcase(figure["name"], row.figure):
            yield f"{shown(figure['value'])} {figure['unit']}".strip()
