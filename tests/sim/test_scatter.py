"""The scatter chart: valid SVG with every point in it."""

from xml.etree import ElementTree

from penstock.sim.scatter import HEIGHT, WIDTH, Point, scatter

SVG = "{http://www.w3.org/2000/svg}"


def test_every_point_is_drawn_inside_and_named():
    points = [Point("a", 1, 2, "one <two>"), Point("b", 100, 0.5, "three"), Point("a", 0, 0, "")]
    root = ElementTree.fromstring(scatter(points, "T & t", "x", "y"))
    circles = [c for c in root.iter(f"{SVG}circle") if c.find(f"{SVG}title") is not None]
    assert [c.find(f"{SVG}title").text for c in circles] == ["one <two>", "three", None]
    assert len({c.get("fill") for c in circles}) == 2
    for circle in circles:
        assert 0 < float(circle.get("cx")) < WIDTH
        assert 0 < float(circle.get("cy")) < HEIGHT
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"T & t", "x", "y", "a", "b"} <= set(texts)


def test_no_points_is_an_empty_chart():
    ElementTree.fromstring(scatter([], "t", "x", "y"))
