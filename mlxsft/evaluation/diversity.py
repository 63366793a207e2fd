"""Answers → how unlike each other they are."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

from mlxsft.data.traits import form

FORMS = ("prose", "list", "table", "code block", "JSON")  # that `form` tells apart
_OPENING_WORDS = 3


@lru_cache(maxsize=4096)  # answers are looked at hundreds of times, in ever new company
def words_of(text: str) -> tuple[str, ...]:
    """The words in lower case, without punctuation."""
    return tuple(re.findall(r"\w+(?:['’]\w+)*", text.casefold()))


def distinct(answers: Sequence[str], n: int) -> float | None:
    """Different sequences of n words ÷ all of them, over all answers together (https://arxiv.org/abs/1510.03055)."""
    grams = [_grams(answer, n) for answer in answers]
    total = sum(map(len, grams))
    return len(set().union(*grams)) / total if total else None


def length_spread(answers: Sequence[str]) -> float | None:
    """Standard deviation ÷ mean of the lengths in words; 0 where all answers are equally long."""
    lengths = [len(words_of(answer)) for answer in answers]
    middle = sum(lengths) / len(lengths) if lengths else 0
    return math.sqrt(sum((n - middle) ** 2 for n in lengths) / len(lengths)) / middle if middle else None


def opening_entropy(answers: Sequence[str]) -> float | None:
    """Bits that the first three words carry: 0 where all answers begin alike, log₂ of their number where none do."""
    counts = Counter(" ".join(words_of(answer)[:_OPENING_WORDS]) for answer in answers)
    if not answers:
        return None
    return sum(n / len(answers) * math.log2(len(answers) / n) for n in counts.values())


def forms(answers: Sequence[str]) -> dict[str, float]:
    """The share of the answers in each form that `traits.form` tells apart; together 1."""
    counts = Counter(map(_form, answers))
    return {name: counts[name] / len(answers) for name in FORMS} if answers else {}


@lru_cache(maxsize=8192)
def _grams(text: str, n: int) -> tuple[tuple[str, ...], ...]:
    words = words_of(text)
    return tuple(words[i : i + n] for i in range(len(words) - n + 1))


_form = lru_cache(maxsize=4096)(form)
