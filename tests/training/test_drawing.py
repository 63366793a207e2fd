"""Curves in a terminal, dot by dot."""

from __future__ import annotations

from mlxsft.training.drawing import Curve, draw
from mlxsft.training.history import Point, thinned


def rows(*curves: Curve, width: int = 16, height: int = 2, ascii_only: bool = False) -> list[str]:
    return draw(curves, width=width, height=height, ascii_only=ascii_only).plain.splitlines()


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    assert rows(Curve([(0, 0.0), (40, 1.0)], "")) == [
        "0.79 ┤     ⣀⠤⠔⠒⠉",
        "     │⣀⠤⠔⠒⠉⠁    ",
        "     └──────────",
        "      0 40 steps",
    ]


def test_a_level_line_fills_one_row_of_dots() -> None:
    upper, *_ = rows(Curve([(0, 1.0), (9, 1.0)], ""), height=1, width=18)
    assert upper == "1.00 ┤" + 12 * "⠤"


def test_marks_lie_over_lines_and_ascii_is_ascii() -> None:
    curve = Curve([(0, 0.0), (8, 1.0)], "", [(0, 0.0, "o"), (8, 1.0, "*")])
    text = "\n".join(rows(curve, ascii_only=True))
    assert text.isascii()
    assert (text.count("o"), text.count("*")) == (1, 1)
    assert "." in text


def test_nothing_is_said_to_be_nothing() -> None:
    assert rows(Curve([], "")) == ["nothing to draw yet"]
    assert len(rows(Curve([(3, 2.0)], ""), height=3)) == 5  # one point is a dot


def test_thinning_keeps_means_and_ranges() -> None:
    values = [(1, 4.0), (2, 2.0), (3, 1.0), (4, 3.0), (5, 7.0)]
    assert thinned(values, 3) == [Point(1.5, 3.0, 2.0, 4.0), Point(3.5, 2.0, 1.0, 3.0), Point(5, 7.0, 7.0, 7.0)]
    assert thinned(values, 5) == [Point(step, value, value, value) for step, value in values]
    assert thinned([], 5) == []
