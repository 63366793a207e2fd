"""An answer and its reference → how much of each other they hold, from 0 to 1."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.errors import UsageError
from mlxsft.evaluation.diversity import words_of

INSTALL = "Install it: pip install 'mlxsft[eval]'"
_ORDERS = 4  # words of the longest phrases that BLEU counts


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


class SelfBleu:
    """The mean of sacrebleu's sentence BLEU of each answer against all others, ÷ 100, of any choice of some answers.

    1 where they are copies (https://arxiv.org/abs/1802.01886). What phrases each has of each other is counted once.
    """

    def __init__(self, answers: Sequence[str]) -> None:
        refuse_without_sacrebleu()
        from sacrebleu.metrics.helpers import extract_all_word_ngrams
        from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

        cut = Tokenizer13a()
        counted = [extract_all_word_ngrams(cut(answer.rstrip()), 1, _ORDERS) for answer in answers]
        self.lengths = np.array([length for _, length in counted])
        holders: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # (answer, how often) of each phrase
        for i, (phrases, _) in enumerate(counted):
            for phrase, times in phrases.items():
                holders.setdefault(phrase, []).append((i, times))
        # Of each answer: the words of each phrase, less one [phrases]; how often all have it [n, phrases].
        self.orders, self.common = list[NDArray[np.int64]](), list[NDArray[np.uint16]]()
        for phrases, _ in counted:
            common = np.zeros((len(answers), len(phrases)), np.uint16)
            for column, phrase in enumerate(phrases):
                who, times = zip(*holders[phrase], strict=True)
                common[list(who), column] = np.minimum(times, phrases[phrase])
            self.orders.append(np.array([len(phrase) - 1 for phrase in phrases], np.int64))
            self.common.append(common)

    def of(self, chosen: NDArray[np.int64]) -> float | None:
        """Of the answers with these numbers; None of fewer than two."""
        if len(chosen) < 2:
            return None
        return sum(self._sentence(i, chosen[chosen != i]) for i in chosen.tolist()) / len(chosen)

    def _sentence(self, i: int, others: NDArray[np.int64]) -> float:
        from sacrebleu.metrics.bleu import BLEU

        orders, own = self.orders[i], self.common[i][i]
        found = self.common[i][others].max(axis=0)
        correct, total = (np.bincount(orders, times, _ORDERS).astype(int).tolist() for times in (found, own))
        length, lengths = int(self.lengths[i]), self.lengths[others]
        nearest = min(lengths.tolist(), key=lambda other: (abs(other - length), other))
        score = BLEU.compute_bleu(correct, total, length, nearest, smooth_method="exp", effective_order=True)
        return float(score.score) / 100


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
