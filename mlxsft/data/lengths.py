"""Lengths in tokens → the numbers and the histogram that describe them."""

from __future__ import annotations

from array import array

import numpy as np

BINS = 24


class Lengths:
    """A growing row of lengths, 4 bytes each."""

    def __init__(self) -> None:
        self._values = array("I")

    def add(self, length: int) -> None:
        self._values.append(length)

    def summary(self) -> dict[str, float]:
        """min, median, mean, p95 and max; empty for no lengths."""
        values = np.frombuffer(self._values, dtype=np.uint32)
        if not len(values):
            return {}
        return {
            "min": int(values.min()),
            "median": float(np.median(values)),
            "mean": round(float(values.mean()), 1),
            "p95": round(float(np.percentile(values, 95)), 1),
            "max": int(values.max()),
        }

    def middle(self, share: float) -> tuple[int, int]:
        """The shortest and the longest of the given share in the middle; (0, 0) for no lengths."""
        values = np.frombuffer(self._values, dtype=np.uint32)
        if not len(values):
            return 0, 0
        low, high = np.percentile(values, [50 * (1 - share), 50 * (1 + share)])
        return int(low), int(np.ceil(high))

    def histogram(self, bins: int = BINS) -> list[tuple[int, int, int]]:
        """(from, to, count), both ends included; the last bin takes all above the 99th percentile's neighbourhood."""
        values = np.frombuffer(self._values, dtype=np.uint32).astype(np.int64)
        if not len(values):
            return []
        low, high = int(values.min()), int(values.max())
        typical = min(high, int(np.percentile(values, 99) * 1.2) + 1)  # a few giants shall not flatten the rest
        step = max(1, -(-(typical - low + 1) // bins))
        places = np.minimum((values - low) // step, bins - 1)
        counts = np.bincount(places, minlength=1).tolist()
        last = len(counts) - 1
        return [(low + i * step, high if i == last else low + (i + 1) * step - 1, n) for i, n in enumerate(counts)]

    def to_dict(self) -> dict[str, object]:
        bins = [{"from": low, "to": high, "count": count} for low, high, count in self.histogram()]
        return {**self.summary(), "histogram": bins}
