"""Charts: well-formed, inside their frame, with the points where they belong."""

import re
from xml.etree import ElementTree

import pytest

from penstock.sim.chart import HEIGHT, LEFT, RIGHT, WIDTH, Axes, Cell, Series, line_chart, strips

AXES = Axes(title="a < b", x_label="s", y_label="req/s", marks=((5.0, "limit"),))


def points(svg: str) -> list[tuple[float, float]]:
    (path,) = re.findall(r'<path d="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path)]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def test_a_line_begins_left_and_ends_right_and_higher_is_further_up() -> None:
    svg = line_chart(AXES, [Series("one", [0, 5, 10], [0, 1, 4], "decode")])
    (x0, y0), (x1, y1), (x2, y2) = points(svg)
    assert (x0, x2) == (LEFT, WIDTH - RIGHT)
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y0 > y1 > y2 > 0
    assert y0 == HEIGHT - 40
    assert {"a < b", "limit", "one", "0", "10"} <= set(texts(svg))


def test_a_logarithmic_axis_gives_every_factor_the_same_room() -> None:
    axes = Axes(title="t", x_label="ms", y_label="share", is_log_x=True, y_max=1.0)
    xs = [at[0] for at in points(line_chart(axes, [Series("", [1, 10, 100], [0, 0.5, 1], "p")]))]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_many_points_are_thinned_and_the_last_one_is_kept() -> None:
    xs = list(range(10_001))
    drawn = points(line_chart(AXES, [Series("", xs, xs, "p")]))
    assert len(drawn) < 700
    assert drawn[-1][0] == WIDTH - RIGHT


def test_nothing_to_draw_is_an_empty_chart() -> None:
    assert "path" not in line_chart(AXES, [Series("", [], [], "p")])
    ElementTree.fromstring(strips(AXES, []))


def test_a_strip_per_worker_with_cells_side_by_side() -> None:
    rows = [("w<0", [Cell(0, 5, "decode", 1.0, "busy & more"), Cell(5, 10, "mixed", 0.0, "")])]
    svg = strips(AXES, [*rows, ("w1", [])])
    first, second = ElementTree.fromstring(svg).iter("rect")
    assert float(first.get("x", "")) == LEFT
    assert float(second.get("x", "")) == pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.1)
    assert first.get("fill-opacity") == "1.00"
    assert {"w<0", "w1"} <= set(texts(svg))
