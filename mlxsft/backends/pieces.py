"""Into how many pieces a large computation is cut, equally many in all parts of a batch that are computed side by side.

MLX runs at most a hundred operations ahead of what is computed, on all streams together. So the streams of two cores
stay in step only while their graphs are alike: where one has a piece more, its products come when the other has its
small operations, and each waits for the other (SmolLM2-135M, 2 rows of 203 tokens a core take 2.0 s, and 203 beside
195 took 2.8 s before this).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

SLACK = 1.5  # how many times larger than it should be a piece may get to stay in step


class InStep:
    """The numbers of pieces of parts that are computed side by side, in the order in which their graphs are made.

    The part that first gets somewhere decides, the others follow: each runs the same code in the same order, until one
    would get too large a piece. From there on it may go out of step, which costs time alone.
    """

    def __init__(self) -> None:
        self._counts: list[int] = []

    def part(self) -> Way:
        """For one more part."""
        return Way(self._counts)


class Way:
    """One part's way along the common numbers of pieces. Graphs are made in one thread."""

    def __init__(self, counts: list[int]) -> None:
        self._counts = counts
        self._reached = 0

    @contextmanager
    def making(self) -> Iterator[None]:
        """Within it, this part's graph is made."""
        global _current
        before, _current = _current, self
        try:
            yield
        finally:
            _current = before

    def count(self, size: int, most: int) -> int:
        """How many pieces of at most `most`, or SLACK times that, in step with the other parts."""
        if self._reached == len(self._counts):
            self._counts.append(_needed(size, most))
        count = self._counts[self._reached]
        self._reached += 1
        return count if size <= count * most * SLACK else _needed(size, most)


_current: Way | None = None


def pieces(size: int, most: int) -> list[slice]:
    """`size` things in pieces of equal size, of at most `most`, or a little more where that keeps parts in step."""
    count = min(_needed(size, most) if _current is None else _current.count(size, most), max(1, size))
    bounds = [number * size // count for number in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(bounds)]


def _needed(size: int, most: int) -> int:
    return max(1, -(-size // most))
