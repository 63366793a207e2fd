"""Curves in a terminal: lines of braille dots, two by four in a character, with marks over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rich.text import Text

Place = tuple[float, float]

_BRAILLE = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # bits by row and column (Unicode chart U2800)


@dataclass(frozen=True)
class Curve:
    """A line through `points` (x, y), and characters at places on top of it: (x, y, character)."""

    points: Sequence[Place]
    style: str
    marks: Sequence[tuple[float, float, str]] = field(default=())
    mark_style: str = ""


def draw(curves: Sequence[Curve], *, width: int, height: int, ascii_only: bool = False) -> Text:
    """The curves over common axes, `width` characters wide with the labels, `height` high without the lower axis."""
    places = [p for c in curves for p in c.points] + [(x, y) for c in curves for x, y, _ in c.marks]
    if not places:
        return Text("nothing to draw yet")
    (left, right), (bottom, top) = (_range([p[axis] for p in places]) for axis in (0, 1))
    labels = _labels(bottom, top, height)
    margin = max(map(len, labels))
    canvas = _Canvas(max(8, width - margin - 2), height, (left, right), (bottom, top), ascii_only)
    for curve in curves:
        canvas.line(curve)
    for curve in curves:
        canvas.mark(curve)
    lines = [
        Text.assemble((f"{label:>{margin}} ", "dim"), ("|" if ascii_only else "┤" if label else "│", "dim"), row)
        for label, row in zip(labels, canvas.rows(), strict=True)
    ]
    first, last = f"{left:,.0f}", f"{right:,.0f} steps"
    axis = ("+" if ascii_only else "└") + ("-" if ascii_only else "─") * canvas.width
    lines.append(Text(f"{'':{margin}} {axis}", "dim"))
    lines.append(Text(f"{'':{margin}}  {first}{last:>{canvas.width - len(first)}}", "dim"))
    return Text("\n").join(lines)


class _Canvas:
    def __init__(self, width: int, height: int, x: tuple[float, float], y: tuple[float, float], plain: bool) -> None:
        self.width, self.height, self.x, self.y, self.plain = width, height, x, y, plain
        self.dots = [[0] * width for _ in range(height)]
        self.styles = [[""] * width for _ in range(height)]
        self.marks: dict[tuple[int, int], tuple[str, str]] = {}

    def at(self, place: Place) -> tuple[float, float]:
        """Column and row of a place, counted in dots from the upper left."""
        across = (place[0] - self.x[0]) / (self.x[1] - self.x[0])
        down = (self.y[1] - place[1]) / (self.y[1] - self.y[0])
        return across * (2 * self.width - 1), down * (4 * self.height - 1)

    def line(self, curve: Curve) -> None:
        ends = [self.at(p) for p in curve.points]
        for (x0, y0), (x1, y1) in pairwise(ends) if len(ends) > 1 else [(e, e) for e in ends]:
            count = int(max(abs(x1 - x0), abs(y1 - y0))) + 1
            for i in range(count + 1):
                self.dot(round(x0 + (x1 - x0) * i / count), round(y0 + (y1 - y0) * i / count), curve.style)

    def dot(self, x: int, y: int, style: str) -> None:
        self.dots[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        self.styles[y // 4][x // 2] = style

    def mark(self, curve: Curve) -> None:
        for x, y, character in curve.marks:
            column, row = self.at((x, y))
            self.marks[round(row) // 4, round(column) // 2] = character, curve.mark_style

    def rows(self) -> list[Text]:
        return [Text.assemble(*(self._cell(r, c) for c in range(self.width))) for r in range(self.height)]

    def _cell(self, row: int, column: int) -> tuple[str, str]:
        if (row, column) in self.marks:
            return self.marks[row, column]
        if bits := self.dots[row][column]:
            return "." if self.plain else chr(_BRAILLE + bits), self.styles[row][column]
        return " ", ""


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The lowest and the highest value, apart even where they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _labels(bottom: float, top: float, height: int) -> list[str]:
    """A number on every fourth line, with as many digits as tell them apart."""
    span = top - bottom
    digits = 1 if span >= 20 else 2 if span >= 0.5 else 3 if span >= 0.05 else 4
    return [f"{top - span * (4 * r + 1.5) / (4 * height - 1):.{digits}f}" if r % 4 == 0 else "" for r in range(height)]
