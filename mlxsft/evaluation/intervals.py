"""Values per row → means with intervals, before and after, by the bootstrap over rows; what is no mean, over halves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000
HALVES = 500
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


def difference(first: Sequence[ArrayLike], second: Sequence[ArrayLike], *, seed: int) -> Paired:
    """Σ base ÷ Σ weights and Σ tuned ÷ Σ weights of the first rows, less those of the second, which are other rows.

    Both are (base, tuned, weights), [rows] each. Either side is resampled by itself, as `paired` does it.
    """
    ratios = []
    for number, columns in enumerate((first, second)):
        rows = np.stack([np.asarray(a, np.float64) for a in columns], axis=1)
        sums = np.concatenate([rows.sum(axis=0, keepdims=True), _resampled(rows, seed + number)])
        ratios.append(sums[:, :2] / sums[:, 2:])
    before, after = (ratios[0] - ratios[1]).T
    return Paired(_estimate(before), _estimate(after), _estimate(after - before))


Statistic = Callable[[NDArray[np.int64]], float | None]  # of the answers with these numbers; None: it has none


def halves(base: Statistic, tuned: Statistic, count: int, *, seed: int) -> Paired | None:
    """Statistics of `count` answers that are no means of something per answer, and their change; None without them.

    Drawn with replacement, an answer would stand beside its own copy: less distinct, more like the others, whatever the
    model does. So each resample is a random half of the answers, without replacement, the same half of both sides:
    around their own mean, which is that of half as many answers, they spread as the statistic of all answers does
    (the delete-d jackknife with d = n ÷ 2 of C. F. J. Wu, Annals of Statistics 1990, on which
    https://doi.org/10.1214/aos/1176349268 goes on; for r of n answers it is scaled by √(r ÷ (n - r)), here 1 or next to
    it).
    """
    everything, random = np.arange(count), np.random.default_rng(seed)
    whole = base(everything), tuned(everything)
    if whole[0] is None or whole[1] is None:
        return None
    drawn = [np.sort(random.permutation(count)[: count // 2]) for _ in range(HALVES)]
    found = np.array([(base(half), tuned(half)) for half in drawn], np.float64)  # None becomes NaN
    found = found[np.isfinite(found).all(axis=1)]
    if not len(found):
        return None
    scale = np.sqrt((count // 2) / (count - count // 2))
    sides = [
        np.concatenate([[value], value + scale * (values - values.mean())])
        for value, values in zip(whole, found.T, strict=True)
    ]
    return Paired(_estimate(sides[0]), _estimate(sides[1]), _estimate(sides[1] - sides[0]))


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
