"""`python tests/parity_page.py`: runs the whole parity matrix, and writes `docs/parity.md` if every cell is equal.

CI runs all ways in every cell, and failover in some; this runs failover in every one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from parity_rows import CELLS, MODELS, ROWS, rows_of_fields
from parity_ways import WAYS, after_a_kill, answers, equal, told

from kvferry.log import setup_logging

PAGE: Final = Path(__file__).parents[1] / "docs" / "parity.md"
FAILOVER: Final = "failover"
COLUMNS: Final = (*WAYS, FAILOVER)
EQUAL: Final = "="
UNEQUAL: Final = "**≠**"
REASONS: Final = {
    "a": "refused: it chooses among whole answers, or tells what is known before the first token",
    "b": "its choices have no middle in which a worker could fail",
}
HEAD: Final = """# Parity

Each request below was answered by a single worker, by a prefill and a decode worker, by the same with the prompt in
both caches, by a decode worker that prefills itself, and by a pair whose decode worker was killed in the middle of the
answer and replaced by a spare; each way once whole and once streamed, in this order. `=` says that the answer is the
single worker's bit for bit: text, token ids, log-probabilities, reasons, usage. A single worker's own `=` says that it
answered. Written by `make parity`, in `exact`, with an engine whose every value depends on every byte of the context.
"""


def cell(name: str, stream: bool, column: str) -> str:
    """One answer compared."""
    if (name, stream) not in CELLS:
        return "a"
    single = answers("single worker")[name, stream]
    if column != FAILOVER:
        way = next(way for way in WAYS if way == column)
        return EQUAL if equal(name, stream, answers(way)[name, stream], single) else UNEQUAL
    if (found := after_a_kill(name, stream=stream)) is None:
        return "b"
    # After a kill tokens come in other company: a stream is what its events add up to.
    return EQUAL if told(found) == told(single) else UNEQUAL


def matrix() -> Iterator[tuple[str, list[str]]]:
    for name in ROWS:
        yield name, [cell(name, stream, column) for column in COLUMNS for stream in (False, True)]


def fields() -> str:
    """Every field of the request models, and which rows have it."""
    lines = ["| route | field | rows |", "|---|---|---|"]
    for path, (_, no_row) in MODELS.items():
        for field, names in rows_of_fields(path).items():
            shown = ", ".join(name.partition(" ")[2] for name in names) or f"none: {no_row[field]}"
            lines.append(f"| `{path}` | `{field}` | {shown} |")
    return "\n".join(lines)


def page(cells: Mapping[str, Sequence[str]]) -> str:
    lines = [f"| request | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for name, found in cells.items():
        pairs = [" ".join(found[at : at + 2]) for at in range(0, len(found), 2)]
        lines.append(f"| {name} | {' | '.join(pairs)} |")
    reasons = [f"- `{letter}`: {reason}" for letter, reason in REASONS.items()]
    return "\n".join([HEAD, *lines, "", *reasons, "", "## Fields", "", fields(), ""])


def read(text: str) -> dict[str, list[str]]:
    """The cells of a page, row by row."""
    table = text.partition("\n|---")[2].partition("\n\n")[0].splitlines()[1:]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in table]
    return {row[0]: " ".join(row[1:]).split() for row in rows}


def main() -> int:
    setup_logging("error", "auto", service="parity")
    found: dict[str, list[str]] = {}
    for name, cells in matrix():
        found[name] = cells
        print(f"{name}: {' '.join(cells)}", flush=True)
    if unequal := [name for name, cells in found.items() if UNEQUAL in cells]:
        print(f"not equal: {', '.join(unequal)}", file=sys.stderr)
        return 1
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
