"""The pictures of `docs/performance.md`: SVG that suits a light and a dark page, made from results alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final

WIDTH: Final = 760
CHARACTER: Final = 7.0  # width of one in a label, about
ROOM: Final = 90  # for the value behind a bar
ROW: Final = 22
HEADING: Final = 34
STYLE: Final = """
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .heading { font-weight: 600 }
    .own { fill: #2563eb } .other { fill: #9aa4b2 } .target { stroke: #d1242f; stroke-width: 2 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .own { fill: #6ea8fe } .other { fill: #6b7684 } .target { stroke: #ff7b72 }
    }
"""

Document = Mapping[str, Any]  # a results file


@dataclass(frozen=True, slots=True)
class Bar:
    label: str
    value: float
    own: bool = True  # kvferry's, as against others'
    target: float | None = None  # a mark
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Bars on one scale."""

    heading: str
    bars: Sequence[Bar]


def shown(value: float) -> str:
    """Three digits, as many as a figure that is measured on a shared machine deserves; whole numbers in full."""
    if value % 1 == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def bars(title: str, groups: Sequence[Group]) -> str:
    """Horizontal bars, the longest of each group as wide as there is room."""
    column = _column(bar.label for group in groups for bar in group.bars)
    parts, y = [], 0
    for group in groups:
        y += HEADING
        parts.append(f'<text class="heading" x="0" y="{y - 10}">{escape(group.heading)}</text>')
        longest = max(max(bar.value, bar.target or 0.0) for bar in group.bars)
        scale = (WIDTH - column - ROOM) / longest if longest > 0 else 0.0
        for bar in group.bars:
            end = column + bar.value * scale
            kind = "own" if bar.own else "other"
            parts += [
                f'<text x="{column - 10}" y="{y + 15}" text-anchor="end">{escape(bar.label)}</text>',
                f'<rect class="{kind}" x="{column}" y="{y + 3}" width="{end - column:.1f}" height="{ROW - 6}" rx="2"/>',
            ]
            behind = end
            if bar.target is not None:
                mark = column + bar.target * scale
                parts.append(f'<line class="target" x1="{mark:.1f}" x2="{mark:.1f}" y1="{y}" y2="{y + ROW}"/>')
                behind = max(end, mark)
            value = f"{shown(bar.value)} {bar.unit}".strip()
            parts.append(f'<text x="{behind + 6:.1f}" y="{y + 15}">{escape(value)}</text>')
            y += ROW
    return _svg(title, y + 6, parts)


def dots(title: str, rows: Sequence[tuple[str, Sequence[float], bool]], unit: str) -> str:
    """A row of dots for each (label, values, whether they are kvferry's), all on one scale from 0."""
    column = _column(label for label, _, _ in rows)
    largest = max(max(values) for _, values, _ in rows)
    scale = (WIDTH - column - ROOM) / largest if largest > 0 else 0.0
    parts, y = [], 0
    for label, values, own in rows:
        parts.append(f'<text x="{column - 10}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
        kind = "own" if own else "other"
        parts += [
            f'<circle class="{kind}" cx="{column + value * scale:.1f}" cy="{y + 11}" r="4" fill-opacity="0.6"/>'
            for value in values
        ]
        worst = f"{shown(max(values))} {unit}"
        parts.append(f'<text x="{column + max(values) * scale + 8:.1f}" y="{y + 15}">{escape(worst)}</text>')
        y += ROW
    return _svg(title, y + 6, parts)


def _column(labels: Iterable[str]) -> int:
    """Width of the column of labels."""
    return round(max(map(len, labels)) * CHARACTER) + 12


def _svg(title: str, height: int, parts: Sequence[str]) -> str:
    body = "\n  ".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" width="{WIDTH}">\n'
        f"  <title>{escape(title)}</title>\n  <style>{STYLE}  </style>\n  {body}\n</svg>\n"
    )


def versus(document: Document) -> str:
    """How many times the rival's speed, and what was to be reached."""
    found = [
        Bar(figure["name"], figure["value"], target=figure["limit"], unit="×")
        for figure in document["figures"]
        if figure["at_least"]
    ]
    return bars("kvferry's speed over others', with the targets", [Group("times the other's speed", found)])


def engine(document: Document) -> str:
    """Tokens per second of every engine, one group for each measure."""
    speeds: dict[str, list[Bar]] = {}
    for figure in document["figures"]:
        name, _, measure = figure["name"].rpartition(": ")
        if figure["unit"] == "tok/s":
            own = name.startswith("native")
            speeds.setdefault(measure, []).append(Bar(name, figure["value"], own))
    groups = [Group(f"{measure}, tok/s", found) for measure, found in speeds.items()]
    return bars("Tokens per second of the engines, in process", groups)


def interference(document: Document) -> str:
    """The worst gap of each arrival."""
    ending = ": stall per arrival, ms"
    rows = [
        (name.removesuffix(ending), values, name.startswith("disaggregated"))
        for name, values in document["raw"].items()
        if name.endswith(ending)
    ]
    return dots("Worst gap of any stream, for each arriving prompt", rows, "ms")


def serving(document: Document) -> str:
    """Every server on each measure."""
    measures: dict[str, list[Bar]] = {}
    for figure in document["figures"]:
        name, _, measure = figure["name"].rpartition(": ")
        bar = Bar(name, figure["value"], name.startswith("kvferry"), unit=figure["unit"])
        measures.setdefault(measure, []).append(bar)
    groups = [Group(measure, found) for measure, found in measures.items()]
    return bars("A recorded load on whole servers", groups)


def placement(document: Document) -> str:
    """Goodput of every policy near capacity."""
    groups = [
        Group(
            f"{case}: requests within their targets, %",
            [Bar(policy.replace("_", " "), 100 * row["goodput"], policy == "ours") for policy, row in rows.items()],
        )
        for case, rows in document["raw"].items()
        if case.endswith("16 workers at 85%")
    ]
    return bars("Goodput of placement policies at 85 % of capacity", groups)


PICTURES: Final[Mapping[str, Callable[[Document], str]]] = {
    "versus": versus,
    "engine": engine,
    "interference": interference,
    "serving": serving,
    "placement": placement,
}
