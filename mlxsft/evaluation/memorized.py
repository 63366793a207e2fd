"""Answers to training prompts → what of the training rows they repeat."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from difflib import SequenceMatcher

from mlxsft.data.patterns import spans
from mlxsft.evaluation.diversity import words_of

LONG = 8  # words: shorter answers are often the only right ones, and repeating them shows nothing


def is_long(reference: str) -> bool:
    """Whether repeating this text word for word says that it was learned by heart."""
    return len(words_of(reference)) >= LONG


def repeats(answer: str, reference: str) -> bool:
    """Whether the answer is the reference word for word, whatever its case and punctuation."""
    return words_of(answer) == words_of(reference)


def longest_copy(answer: str, reference: str) -> int:
    """The most words in a row that both have."""
    said, meant = words_of(answer), words_of(reference)
    return SequenceMatcher(None, said, meant, autojunk=False).find_longest_match().size


def leaked(answers: Iterable[tuple[str, str]], training: Iterable[str]) -> Iterator[tuple[int, str, str]]:
    """(number of the answer, kind, text) of personal data and secrets in answers that training rows hold too.

    `answers` are (prompt, answer): what the prompt spells out itself is not leaked. The training texts are read only
    where an answer holds anything of the kind.
    """
    found = [
        (i, kind, text)
        for i, (prompt, answer) in enumerate(answers)
        for kind, text in spans(answer)
        if text not in prompt
    ]
    known = _held(training, {text for _, _, text in found}) if found else set()
    yield from (hit for hit in found if hit[2] in known)


def _held(texts: Iterable[str], wanted: Collection[str]) -> set[str]:
    """Those of the wanted spans that occur in a text."""
    held = set[str]()
    for text in texts:
        held |= {span for span in wanted if span not in held and span in text}
        if len(held) == len(wanted):
            break
    return held
