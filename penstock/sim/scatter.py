"""A scatter chart as SVG text: enough to see a frontier, with nothing to install.

Knows points and axes; what they mean is its caller's (`penstock sim memory --chart`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import floor, log10

WIDTH, HEIGHT = 860, 520
LEFT, RIGHT, TOP, BOTTOM = 80, 250, 50, 60
COLOURS = ("#c0504d", "#1f77b4", "#555555", "#2ca02c", "#9467bd")


@dataclass(frozen=True, slots=True)
class Point:
    """One mark: of which series, where, and what it says when one points at it."""

    series: str
    x: float
    y: float
    label: str


def scatter(points: Sequence[Point], title: str, x_label: str, y_label: str) -> str:
    """Return a chart with both axes from zero, a colour and a legend entry per series."""
    x_max = 1.05 * max((p.x for p in points), default=1.0) or 1.0
    y_max = 1.05 * max((p.y for p in points), default=1.0) or 1.0
    series = list(dict.fromkeys(p.series for p in points))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(series)}

    def place(across: float, up: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - RIGHT) * across / x_max
        return x, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up / y_max

    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="28" font-size="16">{escape(title)}</text>',
        f'<path d="M{LEFT} {TOP}V{bottom}H{right}" fill="none" stroke="black"/>',
        f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 16}" text-anchor="middle">'
        f"{escape(x_label)}</text>",
        f'<text transform="translate(20 {(TOP + bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for tick in _ticks(x_max):
        x, _ = place(tick, 0)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#dddddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{tick:g}</text>')
    for tick in _ticks(y_max):
        _, y = place(0, tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for point in points:
        x, y = place(point.x, point.y)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour[point.series]}"'
            f' fill-opacity="0.75"><title>{escape(point.label)}</title></circle>'
        )
    for index, name in enumerate(series):
        y = TOP + 20 * index + 10
        parts.append(f'<circle cx="{right + 24}" cy="{y}" r="5" fill="{colour[name]}"/>')
        parts.append(f'<text x="{right + 36}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _ticks(top: float) -> list[float]:
    """Return about five round values up to `top`."""
    step = 10 ** floor(log10(top / 2))
    while top / step > 8:
        step *= 2
    return [step * index for index in range(int(top / step) + 1)]
