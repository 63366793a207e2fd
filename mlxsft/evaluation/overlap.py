"""An answer and its reference → how much of each other they hold, from 0 to 1."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mlxsft.errors import UsageError
from mlxsft.evaluation.diversity import words_of

INSTALL = "Install it: pip install 'mlxsft[eval]'"


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words (https://aclanthology.org/W04-1013)."""
    said, meant = words_of(answer), words_of(reference)
    common = _subsequence(said, meant)
    return 2 * common / (len(said) + len(meant)) if common else 0.0


def chrf(answer: str, reference: str) -> float:
    """sacrebleu's chrF2 of one sentence ÷ 100: characters in common (https://aclanthology.org/W15-3049)."""
    return float(_metric("chrf")(answer, [reference])) / 100


def bleu(answer: str, references: Sequence[str]) -> float:
    """sacrebleu's BLEU of one sentence ÷ 100, with the effective order."""
    return float(_metric("bleu")(answer, list(references))) / 100


def self_bleu(answers: Sequence[str]) -> float | None:
    """The mean BLEU of each answer against all others: 1 where they are copies (https://arxiv.org/abs/1802.01886)."""
    if len(answers) < 2:
        return None
    scores = [bleu(answer, [*answers[:i], *answers[i + 1 :]]) for i, answer in enumerate(answers)]
    return sum(scores) / len(scores)


def has_sacrebleu() -> bool:
    return importlib.util.find_spec("sacrebleu") is not None


def refuse_without_sacrebleu() -> None:
    """Raises UsageError with the install command where sacrebleu is not there."""
    if not has_sacrebleu():
        raise UsageError("chrf and bleu need sacrebleu, not installed here", INSTALL)


@cache
def _metric(name: str) -> Callable[[str, list[str]], Any]:
    refuse_without_sacrebleu()
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric: BLEU | CHRF = CHRF() if name == "chrf" else BLEU(effective_order=True)
    return lambda answer, references: metric.sentence_score(answer, references).score


def _subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    best = [0] * (len(b) + 1)
    for word in a:
        before = 0  # best[j - 1] of the row above
        for j, other in enumerate(b, start=1):
            above = best[j]
            best[j] = before + 1 if word == other else max(above, best[j - 1])
            before = above
    return best[-1]
