"""Charts as SVG text: lines over axes, and strips of cells. Numbers in, markup out; no library.

Colours are CSS classes of the page around them (`penstock/sim/report.py`, the only caller), so that
a chart follows the page's light or dark theme.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 26, 40
_POINTS_MAX: Final = 600


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name, points, and CSS class; `is_stepped` draws levels that hold, `is_filled`
    what is below them, over what was drawn before.
    """

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    css: str
    is_stepped: bool = False
    is_filled: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """What a chart is of. `marks` are vertical lines, (x, label)."""

    title: str
    x_label: str
    y_label: str
    is_log_x: bool = False
    y_max: float | None = None
    marks: tuple[tuple[float, str], ...] = ()


def line_chart(axes: Axes, series: Sequence[Series]) -> str:
    """Return one chart with a legend."""
    shown = [s for s in series if len(s.xs)]
    x_values = [float(x) for s in shown for x in s.xs] + [x for x, _ in axes.marks]
    y_values = [float(y) for s in shown for y in s.ys]
    low, high = _range(x_values, is_log=axes.is_log_x)
    top = axes.y_max if axes.y_max is not None else _ceiling(max(y_values, default=1.0))
    scale = _Scale(low, high, top, axes.is_log_x)
    parts = [_frame(axes, scale)]
    parts += [_mark(scale, x, label) for x, label in axes.marks if low <= x <= high]
    parts += [_line(scale, s) for s in shown]
    parts += [_legend(i, s) for i, s in enumerate(shown) if s.name]
    return _svg("".join(parts), HEIGHT)


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a strip: from, to, CSS class, strength 0 to 1, and what a pointer is told."""

    begin: float
    end: float
    css: str
    strength: float
    hint: str


def strips(axes: Axes, rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """Return one strip per row, above each other, over a common x axis."""
    size = max(4.0, min(16.0, 420 / max(len(rows), 1)))
    height = TOP + BOTTOM + math.ceil(size * len(rows))
    end = max((cell.end for _, cells in rows for cell in cells), default=1.0)
    scale = _Scale(0.0, end, 1.0, is_log=False, height=height)
    parts = [_x_axis(axes, scale), _text(LEFT, 15, axes.title, "title")]
    for i, (name, cells) in enumerate(rows):
        y = TOP + i * size
        if size >= 8 or i % 8 == 0:
            parts.append(_text(LEFT - 4, y + size / 2 + 3, name, "tick end"))
        for cell in cells:
            x = scale.x(cell.begin)
            width = max(scale.x(cell.end) - x, 0.3) + 0.2
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{size - 0.6:.1f}"'
                f' class="{cell.css}" fill-opacity="{0.08 + 0.92 * cell.strength:.2f}">'
                f"<title>{escape(cell.hint)}</title></rect>"
            )
    return _svg("".join(parts), height)


@dataclass(frozen=True, slots=True)
class _Scale:
    low: float
    high: float
    top: float
    is_log: bool
    height: int = HEIGHT

    def x(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.is_log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, self.low))
        return LEFT + (at - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        room = self.height - TOP - BOTTOM
        return self.height - BOTTOM - min(value / self.top, 1.02) * room

    def x_ticks(self) -> list[float]:
        if not self.is_log:
            return [t for t in _ticks(self.high) if t >= self.low]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        # Few decades have room for more than their powers of ten.
        factors = (1, 2, 5) if len(powers) <= 5 else (1,)
        ticks = [f * 10.0**p for p in powers for f in factors]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def _frame(axes: Axes, scale: _Scale) -> str:
    parts = [_text(LEFT, 15, axes.title, "title"), _x_axis(axes, scale)]
    for tick in _ticks(scale.top):
        y = scale.y(tick)
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        )
        parts.append(_text(LEFT - 5, y + 3.5, _number(tick), "tick end"))
    middle = (TOP + scale.height - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(13 {middle:.0f}) rotate(-90)" class="label middle">'
        f"{escape(axes.y_label)}</text>"
    )
    return "".join(parts)


def _x_axis(axes: Axes, scale: _Scale) -> str:
    base = scale.height - BOTTOM
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}" class="axis"/>']
    for tick in scale.x_ticks():
        x = scale.x(tick)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}" class="axis"/>')
        parts.append(_text(x, base + 15, _number(tick), "tick middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, scale.height - 8, axes.x_label, "label middle"))
    return "".join(parts)


def _line(scale: _Scale, series: Series) -> str:
    stride = max(1, math.ceil(len(series.xs) / _POINTS_MAX))
    points = list(zip(series.xs, series.ys, strict=True))
    kept = points[::stride]
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    path: list[str] = []
    for i, (x, y) in enumerate(kept):
        if i and series.is_stepped:
            path.append(f"H{scale.x(x):.1f}")
        path.append(f"{'L' if i else 'M'}{scale.x(x):.1f} {scale.y(y):.1f}")
    line = "".join(path)
    if series.is_filled:
        base = scale.y(0.0)
        left = scale.x(kept[0][0])
        return f'<path d="{line}V{base:.1f}H{left:.1f}Z" class="area {series.css}"/>'
    return f'<path d="{line}" class="line {series.css}"/>'


def _mark(scale: _Scale, x: float, label: str) -> str:
    at = scale.x(x)
    is_far_right = at > WIDTH - RIGHT - 60
    place, css = (at - 3, "tick end") if is_far_right else (at + 3, "tick")
    return (
        f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{scale.height - BOTTOM}" class="mark"/>'
        + _text(place, TOP + 9, label, css)
    )


def _legend(index: int, series: Series) -> str:
    # From the right end of the title's line leftwards, in columns of equal width.
    x = WIDTH - RIGHT - 86 * (index + 1)
    return f'<line x1="{x}" x2="{x + 14}" y1="11" y2="11" class="line {series.css}"/>' + _text(
        x + 18, 15, series.name, "tick"
    )


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(text)}</text>'


def _svg(content: str, height: int) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{content}</svg>'


def _range(values: list[float], *, is_log: bool) -> tuple[float, float]:
    if not is_log:
        return 0.0, max([*values, 1e-9])
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive) / 1.1, max(positive) * 1.1
    return low, high


def _ticks(top: float) -> list[float]:
    """Return about five round numbers from 0 to `top`."""
    raw = top / 5
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    return [i * step for i in range(int(top / step * 1.001) + 1)]


def _ceiling(value: float) -> float:
    return max(value * 1.08, 1e-9)


def _number(value: float) -> str:
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.0e}"
    return f"{value:g}"
