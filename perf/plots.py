"""Line charts as SVG text, so that a report is one file without scripts, fonts or images from elsewhere."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 170, 16, 44
_COLORS = ("#0b6e99", "#d1495b", "#6a994e", "#8e6c8a", "#e08e1b", "#4d4d4d", "#17a398", "#a23b72", "#33658a", "#7a5c00")

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis shows, and how."""

    label: str
    logarithmic: bool = False
    """Powers of ten are marked. Values of 0 and less are not drawn."""

    def ticks(self, low: float, high: float) -> list[float]:
        """Round values between the bounds."""
        if self.logarithmic:
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            return [10.0**exponent for exponent in exponents if low <= 10.0**exponent <= high]
        step = 10.0 ** math.floor(math.log10((high - low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
        return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]

    def place(self, value: float, low: float, high: float) -> float:
        """Where between the bounds, 0 to 1, a value is."""
        if self.logarithmic:
            return math.log(value / low) / math.log(high / low)
        return (value - low) / (high - low)

    def bounds(self, values: Sequence[float]) -> tuple[float, float]:
        """Least and greatest value to show: from 0 on a linear axis."""
        high = max(values)
        low = min(values) if self.logarithmic else 0.0
        return (low, high) if high > low else (low, low * 10 if self.logarithmic else low + 1)


def line_chart(title: str, x: Axis, y: Axis, lines: Mapping[str, Points]) -> str:
    """An <svg> with a line and a legend entry for each name; lines of no points are left out."""
    shown = {
        name: [
            point
            for point in points
            if all(math.isfinite(value) for value in point)
            and (point[0] > 0 or not x.logarithmic)
            and (point[1] > 0 or not y.logarithmic)
        ]
        for name, points in lines.items()
    }
    shown = {name: points for name, points in shown.items() if points}
    if not shown:
        return ""
    x_bounds = x.bounds([point[0] for points in shown.values() for point in points])
    y_bounds = y.bounds([point[1] for points in shown.values() for point in points])

    def at_x(value: float) -> float:
        return _LEFT + x.place(value, *x_bounds) * (_WIDTH - _LEFT - _RIGHT)

    def at_y(value: float) -> float:
        return _HEIGHT - _BOTTOM - y.place(value, *y_bounds) * (_HEIGHT - _TOP - _BOTTOM)

    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">']
    for tick in x.ticks(*x_bounds):
        parts.append(f'<line class="grid" x1="{at_x(tick):.1f}" x2="{at_x(tick):.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(f'<text x="{at_x(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for tick in y.ticks(*y_bounds):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at_y(tick):.1f}" y2="{at_y(tick):.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at_y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text x="{(_LEFT + right) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">{html.escape(x.label)}</text>'
    )
    parts.append(
        f'<text transform="translate(14 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y.label)}</text>'
    )
    for number, (name, points) in enumerate(shown.items()):
        color = _COLORS[number % len(_COLORS)]
        path = " ".join(f"{at_x(px):.1f},{at_y(py):.1f}" for px, py in points)
        parts.append(f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{path}"/>')
        legend_y = _TOP + 10 + 18 * number
        parts.append(f'<rect x="{right + 12}" y="{legend_y - 8}" width="12" height="4" fill="{color}"/>')
        parts.append(f'<text x="{right + 30}" y="{legend_y}">{html.escape(name)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)


def bar_chart(title: str, label: str, bars: Mapping[str, float]) -> str:
    """An <svg> with a horizontal bar for each name; those without a value are left out."""
    shown = {name: value for name, value in bars.items() if math.isfinite(value) and value >= 0}
    if not shown or not (highest := max(shown.values())):
        return ""
    left, row = 150, 24
    height = row * len(shown) + 28
    parts = [f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{html.escape(title)}">']
    for number, (name, value) in enumerate(shown.items()):
        y = number * row + 4
        width = value / highest * (_WIDTH - left - 70)
        color = _COLORS[0] if name.startswith("tlsproxy") else "#9aa5ad"
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{width:.1f}" height="{row - 8}" fill="{color}"/>')
        parts.append(f'<text x="{left + width + 6:.1f}" y="{y + 13}">{value:.{0 if value >= 100 else 2}f}</text>')
    parts.append(f'<text x="{left}" y="{height - 6}">{html.escape(label)}</text>')
    parts.append("</svg>")
    return "\n".join(parts)
