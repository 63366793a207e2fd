"""Lengths: the numbers are NumPy's, and every length is in one bin."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsft.data.lengths import Lengths


@given(st.lists(st.integers(0, 3000), min_size=1, max_size=200), st.floats(0, 1))
def test_the_numbers_are_those_of_numpy(values: list[int], share: float) -> None:
    lengths = Lengths()
    for value in values:
        lengths.add(value)
    summary = lengths.summary()
    assert (summary["min"], summary["max"]) == (min(values), max(values))
    assert summary["median"] == pytest.approx(np.median(values))
    assert summary["mean"] == pytest.approx(np.mean(values), abs=0.051)
    assert summary["p95"] == pytest.approx(np.percentile(values, 95), abs=0.051)
    low, high = np.percentile(values, [50 * (1 - share), 50 * (1 + share)])
    assert lengths.middle(share) == pytest.approx((int(low), int(np.ceil(high))), abs=1)
    bins = lengths.histogram()
    assert (bins[0][0], bins[-1][1]) == (min(values), max(values))
    assert [count for _, _, count in bins] == [sum(low <= v <= high for v in values) for low, high, _ in bins]
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(bins))


def test_no_lengths_have_no_numbers() -> None:
    assert (Lengths().summary(), Lengths().middle(0.9), Lengths().histogram()) == ({}, (0, 0), [])
