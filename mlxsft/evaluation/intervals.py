"""Values per row → means with intervals, before and after, by the bootstrap over rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
_AT_ONCE = 1 << 22  # numbers that a block of resamples holds
_TAILS = (2.5, 97.5)  # per cent: 95 of 100 intervals hold the true value


@dataclass(frozen=True)
class Estimate:
    """A value, and the 95 % interval in which it lies."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """The same rows before and after, and the change (after minus before)."""

    base: Estimate
    tuned: Estimate
    change: Estimate


def paired(base: ArrayLike, tuned: ArrayLike, weights: ArrayLike, *, seed: int) -> Paired:
    """Σ base ÷ Σ weights, Σ tuned ÷ Σ weights and their difference, over rows; all three arguments are [rows].

    Each resample draws as many rows as there are, with replacement, and has the row's base, tuned and weight together:
    what makes a row hard or long for both sides does not widen the interval of the change (Efron's percentile
    bootstrap, https://doi.org/10.1214/aos/1176344552). Raises ValueError without rows.
    """
    rows = np.stack([np.asarray(a, np.float64) for a in (base, tuned, weights)], axis=1)
    sums = np.concatenate([rows.sum(axis=0, keepdims=True), _resampled(rows, seed)])
    before, after = sums[:, 0] / sums[:, 2], sums[:, 1] / sums[:, 2]
    return Paired(_estimate(before), _estimate(after), _estimate(after - before))


def mean(values: ArrayLike, *, seed: int) -> Estimate:
    """The mean of values [rows] with its interval. Raises ValueError without rows."""
    rows = np.asarray(values, np.float64)[:, None]
    sums = np.concatenate([rows.sum(axis=0, keepdims=True), _resampled(rows, seed)])
    return _estimate(sums[:, 0] / len(rows))


def _resampled(rows: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """[RESAMPLES, columns]: the sums of each resample."""
    count = len(rows)
    if not count:
        raise ValueError("there are no rows to take an interval over")
    random = np.random.default_rng(seed)
    block = max(1, _AT_ONCE // count)
    sums = []
    for first in range(0, RESAMPLES, block):
        draws = random.multinomial(count, np.full(count, 1 / count), size=min(block, RESAMPLES - first))
        sums.append(draws @ rows)
    return np.concatenate(sums)


def _estimate(values: NDArray[np.float64]) -> Estimate:
    """The first value, with the percentiles of the others, which are resamples of it."""
    low, high = np.percentile(values[1:], _TAILS)
    return Estimate(float(values[0]), float(low), float(high))
