"""The picture of a load: distributions of TTFT and ITL, TTFT over time. An SVG that follows the reader's theme."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from kvferry_local.bench.client import Outcome
from kvferry_local.bench.summary import Summary, percentile

WIDTH: Final = 960
PANEL: Final = (430.0, 200.0)  # of a plot's inside
MARGIN: Final = 48.0
MAX_POINTS: Final = 400  # of one curve: more cannot be seen
STYLE: Final = """
svg { font: 13px system-ui, sans-serif; color-scheme: light dark; }
.ink { fill: #1b1f24; } .axis { stroke: #8b949e; } .faint { fill: #57606a; } .paper { fill: #ffffff; }
.curve { fill: none; stroke: #0969da; stroke-width: 2; } .dot { fill: #0969da; fill-opacity: .55; }
.miss { fill: #cf222e; } .target { stroke: #cf222e; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  .ink { fill: #e6edf3; } .faint { fill: #9da7b1; } .paper { fill: #0d1117; }
  .curve { stroke: #58a6ff; } .dot { fill: #58a6ff; } .miss { fill: #ff7b72; } .target { stroke: #ff7b72; }
}
"""


def picture(title: str, summary: Summary, outcomes: Sequence[Outcome]) -> str:
    whole = [outcome for outcome in outcomes if not outcome.error]
    ttft = sorted(1e3 * outcome.ttft_s for outcome in whole)
    itl = sorted(1e3 * gap for outcome in whole for gap in outcome.gaps)
    began = min((outcome.due for outcome in outcomes), default=0.0)
    points = [(outcome.sent - began, 1e3 * outcome.ttft_s) for outcome in whole]
    width, height = PANEL
    wide = WIDTH - 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 640" role="img">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="640"/>',
        f'<text class="ink" x="{MARGIN}" y="30" font-size="17" font-weight="600">{escape(title)}</text>',
        f'<text class="faint" x="{MARGIN}" y="50">{escape(_headline(summary))}</text>',
        _distribution("TTFT, ms", ttft, 1e3 * summary.ttft_target_s, MARGIN, 90.0, width - MARGIN, height),
        _distribution("ITL, ms", itl, None, MARGIN + width + 24, 90.0, width - MARGIN, height),
        _over_time(points, 1e3 * summary.ttft_target_s, MARGIN, 370.0, wide, height),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _headline(summary: Summary) -> str:
    return (
        f"{summary.num_whole:,} of {summary.num_requests:,} requests whole, goodput {summary.goodput:.1%} "
        f"({summary.goodput_per_s:.2f}/s), {summary.output_tokens_per_s:,.0f} output tokens/s"
    )


def _distribution(
    name: str, ordered: Sequence[float], target: float | None, x: float, y: float, width: float, height: float
) -> str:
    """Share of the values at or below, up to their 99.5th percentile: one stray value must not flatten the rest."""
    if not ordered:
        return _frame(f"{name}: nothing measured", x, y, width, height, 1.0, "")
    top = max(percentile(ordered, 0.995), 1e-3)
    step = max(1, len(ordered) // MAX_POINTS)
    chosen = [(value, (index + 1) / len(ordered)) for index, value in enumerate(ordered)][::step]
    curve = " ".join(f"{x + min(v / top, 1.0) * width:.1f},{y + height * (1 - share):.1f}" for v, share in chosen)
    inside = f'<polyline class="curve" points="{x:.1f},{y + height:.1f} {curve}"/>'
    if target is not None and target <= top:
        at = x + target / top * width
        inside += f'<line class="target" x1="{at:.1f}" x2="{at:.1f}" y1="{y}" y2="{y + height}"/>'
    return _frame(f"{name} (share of values at or below)", x, y, width, height, top, inside)


def _over_time(
    points: Sequence[tuple[float, float]], target: float, x: float, y: float, width: float, height: float
) -> str:
    if not points:
        return _frame("TTFT over time: nothing measured", x, y, width, height, 1.0, "")
    span = max(max(at for at, _ in points), 1e-3)
    top = max(max(value for _, value in points), 1e-3)
    dots = "".join(
        f'<circle class="{"dot" if value <= target else "miss"}" r="2.5" cx="{x + at / span * width:.1f}" '
        f'cy="{y + height * (1 - value / top):.1f}"/>'
        for at, value in points
    )
    if target <= top:
        level = y + height * (1 - target / top)
        dots += f'<line class="target" x1="{x}" x2="{x + width}" y1="{level:.1f}" y2="{level:.1f}"/>'
    scale = f'<text class="faint" x="{x + 6}" y="{y + 14}">{top:,.0f} ms</text>'
    return _frame("TTFT of each request over time, s", x, y, width, height, span, dots + scale)


def _frame(title: str, x: float, y: float, width: float, height: float, top: float, inside: str) -> str:
    """Axes from 0 to `top`, with a heading above."""
    bottom = y + height
    ticks = "".join(
        f'<text class="faint" x="{x + share * width:.1f}" y="{bottom + 18}" text-anchor="middle">'
        f"{top * share:,.4g}</text>"
        for share in (0.0, 0.5, 1.0)
    )
    return (
        f'<text class="ink" x="{x}" y="{y - 8}">{escape(title)}</text>'
        f'<path class="axis" fill="none" d="M{x},{y} V{bottom} H{x + width}"/>{ticks}{inside}'
    )
