"""What is held out: whole groups of equal questions, the same ones wherever they stand, as many as were asked for."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsft.data import holdout
from mlxsft.data.holdout import hold_out, normalise

KEYS = st.lists(st.text("abcdefgh", min_size=1, max_size=1), max_size=40)


def held(keys: list[str], share: float, seed: int = 0) -> list[str]:
    mask = hold_out(keys, share, seed=seed)
    assert mask.dtype == np.bool_
    assert mask.shape == (len(keys),)
    return sorted(key for key, out in zip(keys, mask, strict=True) if out)


@given(KEYS, st.floats(0.001, 0.999), st.integers(0, 5))
def test_whole_groups_as_near_as_they_allow(keys: list[str], share: float, seed: int) -> None:
    out = held(keys, share, seed)
    groups = Counter(keys)
    assert Counter(out) == {key: groups[key] for key in set(out)}
    if len(groups) < 2:
        assert out == []
        return
    sums = {sum(c) for n in range(1, len(groups)) for c in combinations(groups.values(), n)}
    assert len(out) in sums
    assert abs(len(out) - share * len(keys)) == min(abs(s - share * len(keys)) for s in sums)


@given(KEYS, st.floats(0.001, 0.999), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(keys: list[str], share: float, random: Any) -> None:
    moved = random.sample(keys, k=len(keys))
    assert held(moved, share) == held(keys, share)


@pytest.mark.parametrize(
    ("rows", "share", "expected"),
    [(0, 0.5, 0), (1, 0.5, 0), (2, 0.05, 1), (2, 0.99, 1), (3, 0.05, 1), (5, 0.2, 1), (5, 0.4, 2), (5, 0.99, 4),
     (100, 0.05, 5), (1000, 0.05, 50), (20_000, 0.5, 10_000), (100, 0.0, 0)],
)  # fmt: skip
def test_how_many_of_different_rows(rows: int, share: float, expected: int) -> None:
    assert len(held([f"question {i}" for i in range(rows)], share)) == expected


def test_equal_rows_leave_nothing_to_hold_out() -> None:
    assert held(["same"] * 9, 0.3) == []


def test_large_groups_are_split_as_well_as_they_can_be() -> None:
    keys = ["a"] * 3 + ["b"] * 5 + ["c"] * 5 + ["d"] * 7
    for seed in range(20):
        assert len(held(keys, 0.5, seed)) == 10  # 3 + 7 or 5 + 5; taking them as they come gives 8 or 12 for some
    assert len(held(["a"] * 10 + ["b"] * 10, 0.05)) == 10


def test_seeds_choose_different_rows() -> None:
    keys = [f"question {i}" for i in range(200)]
    chosen = {tuple(held(keys, 0.1, seed)) for seed in range(10)}
    assert len(chosen) == 10
    often = Counter(key for seed in range(300) for key in held(keys, 0.1, seed))
    assert len(often) == 200
    assert max(often.values()) < 60  # 30 each on average


def test_the_choice_does_not_depend_on_the_process() -> None:
    assert held([f"question {i}" for i in range(12)], 0.25) == ["question 1", "question 3", "question 7"]


def test_many_rows_take_the_first_ones_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [f"question {i % 700}" for i in range(1000)]
    exactly = held(keys, 0.4)
    monkeypatch.setattr(holdout, "CHOSEN_EXACTLY", 16)
    assert len(held(keys, 0.4)) == len(exactly) == 400
    assert held(keys, 0.4) == exactly


@pytest.mark.parametrize("share", [-0.1, 1.0, 2.0, float("nan")])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="share held out"):
        hold_out(["a", "b"], share, seed=0)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Who  are\n\tYou? ", "who are you?"),
        ("STRASSE", "straße"),
        ("Cafe\u0301", "caf\u00e9"),
        ("", " \n"),
        ("a\u00a0b", "A b"),
    ],
)
def test_normalise(text: str, same: str) -> None:
    assert normalise(text) == normalise(same)
    assert normalise("Who are you?") == "who are you?"


@given(st.text())
def test_normalised_text_stays_what_it_is(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)
    assert normalise(unicodedata.normalize("NFD", text)) == normalise(unicodedata.normalize("NFC", text))
