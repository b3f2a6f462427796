"""The operator's guide leaves out no metric and no alert, and its sums are right."""

from __future__ import annotations

import math
import re
from collections import Counter

import pytest
from docs_tables import metrics_table
from pages import ROOT
from prometheus_server import alert_rules
from sizing_tables import SHAPES, num_blocks

TEXT = (ROOT / "docs" / "operations.md").read_text()


def advised(text: str) -> Counter[str]:
    """Names in the first cells of the tables on metrics and alerts, with how many rows each has."""
    first_cells = re.findall(r"^\| (`(?:kvferry_|Kvferry).*?`) \| ([^\n]+)", text, re.MULTILINE)
    return Counter(name for cell, _ in first_cells for name in re.findall(r"`(\w+)`", cell))


def served() -> set[str]:
    return set(re.findall(r"^\| `(\w+)`", metrics_table(), re.MULTILINE))


def test_every_metric_and_every_alert_has_one_row_and_no_other_has() -> None:
    expected = served() | set(alert_rules())
    rows = advised(TEXT)
    assert sorted(expected - set(rows)) == [], "docs/operations.md does not say what to do about these"
    assert sorted(set(rows) - expected) == [], "docs/operations.md advises on what does not exist"
    assert [name for name, count in rows.items() if count > 1] == []


def test_a_row_that_is_missing_would_be_noticed() -> None:
    without = TEXT.replace("| `kvferry_itl_seconds` |", "| `kvferry_itl` |")
    assert set(advised(TEXT)) - set(advised(without)) == {"kvferry_itl_seconds"}


@pytest.mark.parametrize("name", SHAPES)
def test_the_sizing_table_follows_from_the_formulas_of_the_page(name: str) -> None:
    row = next(line for line in TEXT.splitlines() if line.startswith(f"| {name}, "))
    head, *cells = [cell.strip() for cell in row.strip("|").split("|")]
    layers, kv_heads, head_size = (int(number) for number in head.rpartition(", ")[2].split(" × "))
    bytes_per_token, block_kib, kv_memory_mb, blocks, tokens, sequences = (
        int(re.sub(r"\D", "", cell)) for cell in cells
    )
    assert bytes_per_token == 2 * layers * kv_heads * head_size * 2
    assert block_kib == 16 * bytes_per_token / 1024
    assert blocks == kv_memory_mb * 1_048_576 // (16 * bytes_per_token) == num_blocks(*SHAPES[name])
    assert tokens == 16 * blocks
    assert sequences == blocks // math.ceil(2304 / 16)


def test_the_fleet_table_follows_from_the_formulas_of_the_page() -> None:
    rows = re.findall(r"^\| (?:prefill|decode) \| .* = ([\d,]+) tokens/s \| ([\d,]+) .* of which 80% \| (\d+) \|$",
                      TEXT, re.MULTILINE)  # fmt: skip
    assert len(rows) == 2
    for row in rows:
        asked_for, given, workers = (int(cell.replace(",", "")) for cell in row)
        assert workers == math.ceil(asked_for / (given * 0.8))
