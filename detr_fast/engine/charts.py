"""Line charts as inline SVG, for reports that need no library and no network."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#1f6feb", "#d1480f", "#1a7f4b", "#8250df", "#57606a")
WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 46, 44  # margins around the plotted area


@dataclass(frozen=True)
class Line:
    """One curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    emphasis: bool = True  # a thin pale line otherwise


def line_chart(title: str, x_label: str, lines: Sequence[Line], y_range: tuple[float, float] | None = None) -> str:
    """An ``<svg>`` of the lines with axes, grid and legend. Points that are not finite are left out."""
    lines = [_finite(line) for line in lines]
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True)]
    if not points:
        return f'<p class="none">{html.escape(title)}: nothing to show</p>'
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = y_range or (min(0.0, *(y for _, y in points)), max(y for _, y in points))
    x_ticks, y_ticks = ticks(low_x, high_x, 6), ticks(low_y, high_y, 5)
    if all(float(x).is_integer() for x, _ in points):
        x_ticks = [x for x in x_ticks if x.is_integer()]
    if y_range is None:
        low_y, high_y = min(low_y, y_ticks[0]), max(high_y, y_ticks[-1])
    scale_x = (WIDTH - LEFT - RIGHT) / ((high_x - low_x) or 1.0)
    scale_y = (HEIGHT - TOP - BOTTOM) / ((high_y - low_y) or 1.0)

    def place(x: float, y: float) -> tuple[float, float]:
        return LEFT + (x - low_x) * scale_x, HEIGHT - BOTTOM - (y - low_y) * scale_y

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        f'<text class="title" x="{LEFT}" y="18">{html.escape(title)}</text>',
    ]
    for value in y_ticks:
        _, y = place(low_x, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x, _ = place(value, low_y)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value:g}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="tick" x="{middle:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{html.escape(x_label)}</text>'
    )
    parts += [_curve(line, COLOURS[number % len(COLOURS)], place) for number, line in enumerate(lines)]
    parts += [_legend(lines), "</svg>"]
    return "\n".join(parts)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) that cover the range, at most about ``most``."""
    if high <= low:
        return [float(low)]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _finite(line: Line) -> Line:
    kept = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Line(line.name, [x for x, _ in kept], [y for _, y in kept], line.emphasis)


def _curve(line: Line, colour: str, place: object) -> str:
    assert callable(place)
    points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
    style = f'stroke="{colour}" stroke-width="{2 if line.emphasis else 1.2}" opacity="{1 if line.emphasis else 0.75}"'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    marks = ""
    if len(points) <= 40:
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}"/>' for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke-linejoin="round" {style}/>{marks}'


def _legend(lines: Sequence[Line]) -> str:
    """Names in the colours of their lines, in one row under the title."""
    x, parts = float(LEFT), []
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{x:.0f}" y="28" width="12" height="4" rx="2" fill="{colour}"/>')
        parts.append(f'<text class="tick" x="{x + 17:.0f}" y="34">{html.escape(line.name)}</text>')
        x += 36 + 6.6 * len(line.name)
    return "".join(parts)
