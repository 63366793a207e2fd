"""What rows are like: counts are exact however many values there are, and memory is not."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from mlxsft.data.places import Origin
from mlxsft.data.profile import OTHERS, SHOWN, Profile
from mlxsft.data.scratch import open_scratch


@pytest.fixture
def profile() -> Iterator[Profile]:
    with open_scratch() as scratch:
        yield Profile(scratch)


def test_counts_and_examples_are_exact_among_many_values(profile: Profile) -> None:
    """A value that is rare at first and common at last is counted from its first row on."""
    drawn = np.random.default_rng(0).geometric(0.0005, 20_000).tolist() + [99_999] * 900
    counts = Counter(f"v{n:05}" for n in drawn)
    for line, n in enumerate(drawn, start=1):
        profile.add("opening", f"v{n:05}", Origin("rows.jsonl", line), f"row {line}")
    assert len(counts) > 4000
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:SHOWN]
    assert list(profile.commonest("opening").items()) == common
    assert profile.total("opening") == 20_900
    assert profile.summary()["opening"] == {**dict(common), OTHERS: 20_900 - sum(n for _, n in common)}
    for value, _ in common:
        lines = [i for i, n in enumerate(drawn, start=1) if f"v{n:05}" == value][:3]
        assert [shown.excerpt for shown in profile.examples("opening", value)] == [f"row {line}" for line in lines]


def test_memory_does_not_grow_with_the_values(profile: Profile) -> None:
    peaks = []
    tracemalloc.start()
    for stretch in range(2):
        for n in range(20_000):
            profile.add("opening", f"{stretch} and {n}", Origin("rows.jsonl", n), "a few words of an answer " * 4)
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert peaks[1] - peaks[0] < 50_000
    assert peaks[0] < 3_000_000


def test_what_says_nothing_is_not_known(profile: Profile) -> None:
    for name in ("opening", "category", "language"):
        profile.add(name, "", Origin("rows.jsonl", 1), "")
    assert profile.summary() == {"language": {"": 1}}
    profile.add("category", "a\ud800", Origin("rows.jsonl", 2), "half of a character: \ud800")
    assert profile.summary()["category"] == {"": 1, "a?": 1}
    assert [shown.place for shown in profile.examples("category", "a?")] == ["rows.jsonl:2"]
