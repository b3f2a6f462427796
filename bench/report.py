"""What a benchmark hands back: figures with their limits, printed as a table and written as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from bench.steal import Steal

RESULTS: Final = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured number. `limit` is what it must not exceed (or, with `at_least`, reach)."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    at_least: bool = False

    @property
    def holds(self) -> bool | None:
        """None where nothing was promised."""
        if self.limit is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Report:
    """Figures of one benchmark, with the conditions that they were measured under and the raw samples. Made before the
    measurement begins: it tells what the hypervisor has taken since."""

    benchmark: str
    conditions: dict[str, str] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)
    raw: dict[str, Any] = field(default_factory=dict)
    steal: Steal = field(default_factory=Steal)

    def add(self, name: str, value: float, unit: str = "", limit: float | None = None, at_least: bool = False) -> None:
        self.figures.append(Figure(name, value, unit, limit, at_least))

    @property
    def _conditions(self) -> dict[str, str]:
        return {**self.conditions, "taken by the hypervisor": str(self.steal)}

    @property
    def holds(self) -> bool:
        return all(figure.holds is not False for figure in self.figures)

    def render(self) -> str:
        lines = [f"\n== {self.benchmark} =="]
        lines += [f"   {name}: {value}" for name, value in self._conditions.items()]
        width = max((len(figure.name) for figure in self.figures), default=0)
        for figure in self.figures:
            line = f"   {figure.name:<{width}}  {_number(figure.value):>10} {figure.unit:<6}"
            if figure.limit is not None:
                sign, word = ("≥" if figure.at_least else "≤"), ("holds" if figure.holds else "MISSED")
                line += f"  {sign} {_number(figure.limit)}  {word}"
            lines.append(line.rstrip())
        return "\n".join(lines)

    def write(self, folder: Path = RESULTS) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.benchmark}.json"
        figures = [{**asdict(figure), "holds": figure.holds} for figure in self.figures]
        document = {
            "benchmark": self.benchmark,
            "machine": machine(),
            "conditions": self._conditions,
            "figures": figures,
            "raw": self.raw,
        }
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        return path

    def conclude(self) -> int:
        """Print and write it. Returns the exit status of a benchmark that is a program."""
        print(self.render())
        print(f"   written to {os.path.relpath(self.write())}")
        return 0 if self.holds else 1


def machine() -> dict[str, Any]:
    """What the figures depend on and a reader cannot guess."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return {"cpu": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def percentile(values: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile of at least one value."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def _number(value: float) -> str:
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.4f}" if abs(value) < 1 else f"{value:,.2f}"
