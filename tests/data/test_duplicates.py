"""Near-duplicates: every similar pair is found, no other is, and the work is linear."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest

from mlxsft.data import duplicates
from mlxsft.data.duplicates import KEPT_SHINGLES, THRESHOLD, Texts, groups, shingles, similarity
from mlxsft.data.scratch import open_scratch


def edited(rng: np.random.Generator, words: list[str], changes: int) -> str:
    """The words with some replaced."""
    words = list(words)
    for i in rng.choice(len(words), changes, replace=False):
        words[i] = f"x{rng.integers(1 << 30)}"
    return " ".join(words)


@pytest.fixture
def texts() -> Iterator[Texts]:
    with open_scratch() as scratch:
        yield Texts(scratch)


@pytest.mark.parametrize("at_once", [1 << 17, 100])
def test_pairs_are_those_of_an_exhaustive_search(texts: Texts, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    """In one piece, and where everything is sorted and looked at in many."""
    for name in ("AT_ONCE", "_WORDS_AT_ONCE", "_SIGNATURES_AT_ONCE"):
        monkeypatch.setattr(duplicates, name, at_once)
    rng = np.random.default_rng(0)
    written: list[str] = []
    for family in range(60):
        words = [f"w{n}" for n in rng.integers(0, 3000, rng.integers(20, 200))]
        written += [edited(rng, words, changes) for changes in (0, 1, 2, family % 12)]
    for number, text in enumerate(written):
        assert texts.add(text) == number
    hashes = [shingles(text) for text in written]
    alike = [(i, j) for i, j in combinations(range(len(written)), 2) if similarity(hashes[i], hashes[j]) >= THRESHOLD]
    found = list(texts.pairs())
    assert 100 < len(set(found)) == len(found) <= len(alike)
    assert set(found) <= set(alike)
    assert groups(len(written), found).tolist() == groups(len(written), alike).tolist()


def jaccard(a: str, b: str) -> float:
    """Of the runs of three words themselves."""
    first, second = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
    return len(first & second) / len(first | second)


@pytest.mark.parametrize(("words", "error"), [(60, 1e-9), (200, 1e-9), (3000, 0.06)])
def test_similarity_is_exact_up_to_what_is_kept_and_near_beyond(words: int, error: float) -> None:
    rng = np.random.default_rng(words)
    text = [f"w{n}" for n in rng.integers(0, 1 << 20, words)]
    for changes in (0, words // 30, words // 10, words // 3):
        a, b = " ".join(text), edited(rng, text, changes)
        assert abs(similarity(shingles(a), shingles(b)) - jaccard(a, b)) <= error
    assert len(shingles(" ".join(text))) <= KEPT_SHINGLES


@pytest.mark.parametrize("text", ["Hello, World! It's  me_2.", "", "one", "a-b\tc\nd \x00 e\x7f", "ONE two"])
def test_words_of_ascii_are_those_of_any_text(text: str) -> None:
    """The short way for ASCII gives what the long way gives."""
    assert shingles(text).tolist() == shingles(text.upper()).tolist()
    assert shingles(f"{text} \u2014").tolist() == shingles(text).tolist()  # a dash is no word


def test_groups_are_named_by_their_smallest() -> None:
    assert groups(6, [(4, 5), (3, 4), (1, 2)]).tolist() == [0, 1, 1, 3, 3, 3]


@pytest.mark.parametrize("at_once", [1 << 17, 1000])
def test_ten_thousand_copies_take_linear_work(texts: Texts, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(duplicates, "AT_ONCE", at_once)
    for _ in range(10_000):
        texts.add("the very same question about one and the same thing")
    pairs = texts.pairs()
    assert len(pairs) < 20_000
    assert not any(groups(10_000, pairs))
