"""`python -m bench page`: writes `docs/performance.md`, its pictures, and the tables of
`docs/when-not-to-disaggregate.md` from the results of the benchmarks.

Nothing is measured and nothing is typed in by hand: what no benchmark has written is "not yet measured".
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from bench.page_choice import CHOICE, filled
from bench.page_pictures import PICTURES, shown
from bench.page_targets import SECTIONS, Section, Target
from bench.report import RESULTS, Figure

DOCS: Final = Path(__file__).resolve().parent.parent / "docs"
PAGE: Final = "performance.md"
FOLDER: Final = "pictures"
UNMEASURED: Final = "not yet measured"
HEAD: Final = """# Performance

This page is made from `bench/results/` by `python -m bench page`; a test holds that it is current. `make bench`
measures everything again on your machine, `python -m bench NAME` one benchmark. Ratios between things that were
measured in the same run travel from machine to machine; tokens per second do not.
"""

Results = Mapping[str, Mapping[str, Any]]  # benchmark -> its results file


def read_results(folder: Path = RESULTS) -> Results:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def files(results: Results, docs: Path = DOCS) -> dict[str, str]:
    """Path below `docs/` -> content: the page, every picture that there are results for, and the other page with
    tables if it is there."""
    made = {f"{FOLDER}/{name}.svg": draw(results[name]) for name, draw in PICTURES.items() if name in results}
    if (docs / CHOICE).exists():
        made[CHOICE] = filled((docs / CHOICE).read_text(encoding="utf-8"), results)
    return {PAGE: page(results), **made}


def write(docs: Path = DOCS, results: Results | None = None) -> list[Path]:
    """Writes the files, and removes pictures that are no longer made."""
    made = files(read_results() if results is None else results, docs)
    for old in docs.glob(f"{FOLDER}/*.svg"):
        if f"{FOLDER}/{old.name}" not in made:
            old.unlink()
    for name, content in made.items():
        path = docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return [docs / name for name in made]


def page(results: Results) -> str:
    placed = {benchmark for section in SECTIONS for benchmark in section.benchmarks}
    rest = tuple(name for name in results if name not in placed)
    sections = (*SECTIONS, Section("Other measurements", "", rest)) if rest else SECTIONS
    return "\n".join([HEAD, *(line for section in sections for line in _section(section, results))]).rstrip() + "\n"


def _section(section: Section, results: Results) -> Iterator[str]:
    yield f"## {section.title}\n"
    if section.text:
        yield f"{section.text}\n"
    if section.picture in results:
        yield f"![{section.title}]({FOLDER}/{section.picture}.svg)\n"
    promised = [_target_row(target, results) for target in section.targets]
    promised += [_promised_row(name, figure) for name, figure in _others(section, results) if figure.limit is not None]
    yield from _table(("figure", "value", "target", "", "repeat"), promised)
    measured = [_measured_row(figure) for _, figure in _others(section, results) if figure.limit is None]
    yield from _table(("also measured", "value"), measured)
    for name in section.benchmarks:
        yield _conditions(name, results)


def _target_row(target: Target, results: Results) -> tuple[str, ...]:
    named = [figure for figure in _figures(target.benchmark, results) if target.names(figure.name)]
    worst = min if target.at_least else max  # of several workers
    figure = worst(named, key=lambda each: each.value) if named else None
    limit = figure.limit if figure is not None and target.limit is None else target.limit
    unit = target.unit or (figure.unit if figure is not None else "")
    aim = "" if limit is None else f"{'≥' if target.at_least else '≤'} {_quantity(limit, unit)}"
    if figure is None:
        return (target.what, UNMEASURED, aim, "", _command(target.benchmark))
    judged = Figure(figure.name, figure.value, unit, limit, target.at_least)
    return (target.what, _quantity(figure.value, unit), aim, _verdict(judged), _command(target.benchmark))


def _promised_row(benchmark: str, figure: Figure) -> tuple[str, ...]:
    assert figure.limit is not None
    aim = f"{'≥' if figure.at_least else '≤'} {_quantity(figure.limit, figure.unit)}"
    return (figure.name, _quantity(figure.value, figure.unit), aim, _verdict(figure), _command(benchmark))


def _measured_row(figure: Figure) -> tuple[str, ...]:
    return (figure.name, _quantity(figure.value, figure.unit))


def _others(section: Section, results: Results) -> Iterator[tuple[str, Figure]]:
    """(benchmark, figure) of all that no target of the section names."""
    for benchmark in section.benchmarks:
        named = [target for target in section.targets if target.benchmark == benchmark]
        for figure in _figures(benchmark, results):
            if not any(target.names(figure.name) for target in named):
                yield benchmark, figure


def _figures(benchmark: str, results: Results) -> Iterator[Figure]:
    for row in results.get(benchmark, {"figures": ()})["figures"]:
        yield Figure(row["name"], row["value"], row["unit"], row["limit"], row["at_least"])


def _conditions(benchmark: str, results: Results) -> str:
    if benchmark not in results:
        return f"`{benchmark}`: {UNMEASURED}.\n"
    machine, conditions = results[benchmark]["machine"], results[benchmark]["conditions"]
    where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}"
    return f"`{benchmark}`: {'; '.join((where, *(f'{name}: {value}' for name, value in conditions.items())))}.\n"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    if lines:
        yield "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines, ""])


def _quantity(value: float, unit: str) -> str:
    return f"{shown(value)} {unit}".strip()


def _verdict(figure: Figure) -> str:
    return {True: "holds", False: "**missed**", None: ""}[figure.holds]


def _command(benchmark: str) -> str:
    return f"`python -m bench {benchmark}`"
