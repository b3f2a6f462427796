"""The performance page says what the results say, and no more."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatch
from typing import Any

import pytest
from bench.page import DOCS, UNMEASURED, files, page, read_results, write
from bench.page_choice import CHOICE, TABLES, filled
from bench.page_targets import SECTIONS

# The table of what the native engine is to reach.
ENGINE_ROWS = {
    "single worker, 2 cores: prefill 512 ÷ vLLM": "≥ 1.25",
    "single worker, 2 cores: prefill 2,048 ÷ vLLM": "≥ 1.25",
    "single worker, 2 cores: decode 1 stream ÷ llama.cpp": "≥ 1.3",
    "single worker, 2 cores: decode 8 streams ÷ the better of both": "≥ 2.5",
    "int8, 2 cores: decode 1 stream ÷ llama.cpp Q8_0": "≥ 2",
    "1 + 1 cores: prefill 2,048 ÷ vLLM P/D with NIXL": "≥ 1.4",
    "1 + 1 cores: decode 8 streams ÷ vLLM P/D with NIXL": "≥ 2.3",
    "1 + 1 cores: worst gap per arriving prompt ÷ vLLM's with 256-token chunks on 2 cores": "≤ 0.15",
    "1 thread: prefill 512 ÷ multiply-adds in registers": "≥ 0.8",
    "1 thread: decode 1 stream ÷ read bandwidth": "≥ 0.8",
    "RSS − weights − KV pool − staging": "≤ 350 MB",
}


def results_file(benchmark: str, *figures: dict[str, Any], raw: dict[str, Any] | None = None) -> dict[str, Any]:
    machine = {"cpu": "some CPU", "cores": 2, "python": "3.11"}
    given = [{"unit": "", "limit": None, "at_least": False, **figure} for figure in figures]
    return {"benchmark": benchmark, "machine": machine, "conditions": {"a": "b"}, "figures": given, "raw": raw or {}}


def rows(text: str) -> dict[str, list[str]]:
    """First cell of every table row -> the other cells."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in cells}


def test_the_page_is_current() -> None:
    made = files(read_results())
    assert {name: (DOCS / name).read_text() for name in made if (DOCS / name).exists()} == made, "python -m bench page"
    drawn = {name for name in made if name.endswith(".svg")}
    assert {f"pictures/{path.name}" for path in (DOCS / "pictures").glob("*")} == drawn


def test_the_page_on_when_not_to_has_every_table_and_only_rows_that_a_benchmark_writes() -> None:
    text = (DOCS / CHOICE).read_text()
    assert set(re.findall(r"<!-- figures (\w+) -->", text)) == set(TABLES)
    results = read_results()
    for row in (row for table in TABLES.values() for row in table if row.benchmark in results):
        assert [figure for figure in results[row.benchmark]["figures"] if fnmatch(figure["name"], row.figure)], row
    unmeasured = rows(filled(text, {}))
    assert unmeasured["weights, in each worker"] == ["not yet measured: `python -m bench memory`"]
    figure = {"name": "weights", "value": 269.0, "unit": "MB"}
    assert rows(filled(text, {"memory": results_file("memory", figure)}))["weights, in each worker"] == ["269 MB"]


def test_what_was_not_measured_has_a_row_and_no_number() -> None:
    found = rows(page({}))
    for name, target in ENGINE_ROWS.items():
        assert found[name][:3] == [UNMEASURED, target, ""], name
    for section in SECTIONS:
        assert {target.benchmark for target in section.targets} <= set(section.benchmarks)
        for each in section.targets:
            assert found[each.what][0] == UNMEASURED


def test_a_value_is_judged_by_the_promise_and_not_by_what_the_results_say_of_it() -> None:
    name = "single worker, 2 cores: prefill 512 ÷ vLLM"
    for value, verdict in ((1.3, "holds"), (1.2, "**missed**"), (float("nan"), "**missed**")):
        figure = {"name": name, "value": value, "limit": 0.1, "at_least": False, "holds": True}
        row = rows(page({"versus": results_file("versus", figure)}))[name]
        assert row == [f"{value:g}", "≥ 1.25", verdict, "`python -m bench versus`"]


def test_of_several_workers_the_worst_counts() -> None:
    figures = [
        {"name": f"{name}: RSS − weights − KV pool − staging", "value": v} for name, v in (("a", 99), ("b", 400))
    ]
    row = rows(page({"memory": results_file("memory", *figures)}))["RSS − weights − KV pool − staging"]
    assert row[:3] == ["400 MB", "≤ 350 MB", "**missed**"]


def test_every_figure_of_every_results_file_is_on_the_page() -> None:
    results = dict(read_results())
    results["something new"] = results_file("something new", {"name": "of a new kind", "value": 12345.6, "unit": "s"})
    found = rows(page(results))
    assert found["of a new kind"] == ["12,346 s"]
    for name, document in results.items():
        targets = [target for section in SECTIONS for target in section.targets if target.benchmark == name]
        for figure in document["figures"]:
            shown = [figure["name"], *(target.what for target in targets if target.names(figure["name"]))]
            assert any(each.replace("|", "\\|") in found or each in found for each in shown), figure["name"]


def test_pictures_are_svg_of_the_figures_and_follow_them() -> None:
    results = {
        "versus": results_file("versus", {"name": "a < b", "value": 2.0, "limit": 1.5, "at_least": True}),
        "engine": results_file("engine", {"name": "torch, 1 thread: decode 1", "value": 77.0, "unit": "tok/s"}),
        "interference": results_file("interference", raw={"disaggregated: stall per arrival, ms": [12.0, 34.5]}),
        "placement": results_file("placement", raw={"azure, 16 workers at 85%": {"ours": {"goodput": 0.875}}}),
    }
    made = files(results)
    pictures = {name: ElementTree.fromstring(content) for name, content in made.items() if name.endswith(".svg")}
    assert sorted(pictures) == [f"pictures/{name}.svg" for name in ("engine", "interference", "placement", "versus")]
    texts = {name: " ".join("".join(node.itertext()) for node in root) for name, root in pictures.items()}
    assert "a < b" in texts["pictures/versus.svg"]
    assert "77" in texts["pictures/engine.svg"]
    assert "34.5 ms" in texts["pictures/interference.svg"]
    assert "87.5" in texts["pictures/placement.svg"]
    other = copy.deepcopy(results)
    other["engine"]["figures"][0]["value"] = 78.0
    assert files(other)["pictures/engine.svg"] != made["pictures/engine.svg"]


def test_pictures_without_results_are_removed(tmp_path: Any) -> None:
    figure = {"name": "x", "value": 1.0, "limit": 1.0, "at_least": True}
    write(tmp_path, {"versus": results_file("versus", figure)})
    assert (tmp_path / "pictures" / "versus.svg").exists()
    write(tmp_path, {})
    assert not (tmp_path / "pictures" / "versus.svg").exists()
    assert UNMEASURED in (tmp_path / "performance.md").read_text()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_bars_of_nothing_can_be_drawn(value: float) -> None:
    assert "svg" in files({"versus": results_file("versus", {"name": "x", "value": value, "limit": 0.0,
                                                             "at_least": True})})["pictures/versus.svg"]  # fmt: skip
