"""Charts are valid SVG that stays inside its frame."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from detr_fast.engine.charts import HEIGHT, WIDTH, Line, line_chart, ticks


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (1, 10, [2, 4, 6, 8, 10]), (0, 1250, [0, 500, 1000]), (3, 3, [3])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 5) == expected


def test_every_point_is_inside() -> None:
    chart = line_chart(
        "a < b", "step", [Line("loss", [0, 10, 20, 30], [5.0, math.nan, 0.1, 17.3]), Line("b", [0], [0])]
    )
    ElementTree.fromstring(chart)
    points = re.search(r'points="([^"]*)"', chart)
    assert points is not None
    pairs = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert len(pairs) == 3  # without the one that is not a number
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in pairs)


def test_no_points_say_so() -> None:
    assert "nothing to show" in line_chart("loss", "step", [Line("loss", [], [])])
