"""Lengths in tokens → the numbers and the histogram that describe them."""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

BINS = 24


class Lengths:
    """How often each length was met: no row is longer than `max_tokens`, so memory does not grow with the rows."""

    def __init__(self) -> None:
        self._counts = Counter[int]()

    def add(self, length: int) -> None:
        self._counts[length] += 1

    def summary(self) -> dict[str, float]:
        """min, median, mean, p95 and max; empty for no lengths."""
        if not self._counts:
            return {}
        median, p95 = self._percentiles(50, 95)
        return {
            "min": min(self._counts),
            "median": median,
            "mean": round(sum(length * n for length, n in self._counts.items()) / self._counts.total(), 1),
            "p95": round(p95, 1),
            "max": max(self._counts),
        }

    def middle(self, share: float) -> tuple[int, int]:
        """The shortest and the longest of the given share in the middle; (0, 0) for no lengths."""
        if not self._counts:
            return 0, 0
        low, high = self._percentiles(50 * (1 - share), 50 * (1 + share))
        return int(low), int(np.ceil(high))

    def histogram(self, bins: int = BINS) -> list[tuple[int, int, int]]:
        """(from, to, count), both ends included; the last bin takes all above the 99th percentile's neighbourhood."""
        if not self._counts:
            return []
        values, counts = self._ascending()
        low, high = int(values[0]), int(values[-1])
        typical = min(high, int(self._percentiles(99)[0] * 1.2) + 1)  # a few giants shall not flatten the rest
        step = max(1, -(-(typical - low + 1) // bins))
        places = np.minimum((values - low) // step, bins - 1)
        made = [int(counts[places == i].sum()) for i in range(int(places[-1]) + 1)]
        last = len(made) - 1
        return [(low + i * step, high if i == last else low + (i + 1) * step - 1, n) for i, n in enumerate(made)]

    def to_dict(self) -> dict[str, object]:
        bins = [{"from": low, "to": high, "count": count} for low, high, count in self.histogram()]
        return {**self.summary(), "histogram": bins}

    def _ascending(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The lengths that were met, and how often."""
        pairs = np.array(sorted(self._counts.items()), dtype=np.int64)
        return pairs[:, 0], pairs[:, 1]

    def _percentiles(self, *wanted: float) -> list[float]:
        """As np.percentile has them: between two lengths, in proportion."""
        values, counts = self._ascending()
        ends = np.cumsum(counts)
        found = []
        for percent in wanted:
            place = percent / 100 * (int(ends[-1]) - 1)
            below, above = (values[np.searchsorted(ends, at, side="right")] for at in (int(place), int(np.ceil(place))))
            found.append(float(below + (above - below) * (place - int(place))))
        return found
