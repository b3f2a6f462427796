"""Contrast of colours as a browser has computed them, by the rules of WCAG 2.2."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

MIN_TEXT: Final = 4.5  # 1.4.3, level AA
MIN_LARGE: Final = 3.0  # of large text, and of what shows where a control is and which has the focus: 1.4.11

_RGB: Final = re.compile(r"rgba?\(([\d.]+), ([\d.]+), ([\d.]+)(?:, ([\d.]+))?\)")


def channels(colour: str) -> tuple[float, float, float, float]:
    """Red, green and blue of 255, and alpha of 1."""
    match = _RGB.fullmatch(colour)
    assert match is not None, colour
    red, green, blue = (float(match[number]) for number in (1, 2, 3))
    return red, green, blue, 1.0 if match[4] is None else float(match[4])


def ground_of(layers: Sequence[str]) -> str:
    """The colour that is seen of grounds that lie on each other, the uppermost first. None is half transparent."""
    painted = next(layer for layer in layers if channels(layer)[3] > 0)
    assert channels(painted)[3] == 1, painted
    return painted


def luminance(colour: str) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    parts = [part / 255 for part in channels(colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(colour: str, layers: Sequence[str]) -> float:
    """https://www.w3.org/TR/WCAG22/#dfn-contrast-ratio"""
    assert channels(colour)[3] == 1, colour
    darker, lighter = sorted((luminance(colour), luminance(ground_of(layers))))
    return (lighter + 0.05) / (darker + 0.05)
