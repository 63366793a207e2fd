"""The metrics of a card: their names, what they say, which way is better."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mlxsft.evaluation.intervals import Paired

SECTIONS: Mapping[str, str] = {
    "better": "Is it better?",
    "forgotten": "Did it forget?",
    "narrower": "Did it become narrower?",
    "memorized": "Did it learn rows by heart?",
    "instructions": "Does it follow instructions?",
    "clean": "Does it end, and keep secrets?",
}


@dataclass(frozen=True)
class Kind:
    """What a metric is: its section of the card, its help, whether lower or higher is better, how it is written."""

    section: str
    help: str
    better: Literal["lower", "higher", ""]
    form: str = ".3f"


METRICS: Mapping[str, Kind] = {
    "heldout_loss": Kind("better", "nats a trained token of the held-out rows", "lower"),
    "heldout_perplexity": Kind("better", "e to the power of that", "lower", "#.3g"),
    "task_score": Kind("better", "how far held-out answers keep to the rules of their rows, 0 to 1", "higher", ".1%"),
    "exact": Kind("better", "share of held-out answers that are the row's own, but for white space", "higher", ".1%"),
    "rouge_l": Kind("better", "words in common with the row's own answer, in order, 0 to 1", "higher"),
    "chrf": Kind("better", "characters in common with it, 0 to 1 (sacrebleu)", "higher"),
    "bleu": Kind("better", "phrases in common with it, 0 to 1 (sacrebleu)", "higher"),
    "win_rate": Kind("better", "share of held-out prompts where the tuned answer beats the base's; a tie is half", "higher", ".1%"),  # noqa: E501
    "probe_loss": Kind("forgotten", "nats a token of the general probe texts", "lower"),
    "forgetting": Kind("forgotten", "the probe loss that was gained, in nats a token", "lower"),
    "probe_score": Kind("forgotten", "how far answers to general questions keep to their rules, 0 to 1", "higher", ".1%"),  # noqa: E501
    "distinct_1": Kind("narrower", "different words ÷ all words of sampled answers", "higher"),
    "distinct_2": Kind("narrower", "different pairs of words ÷ all pairs", "higher"),
    "self_bleu": Kind("narrower", "BLEU of each sampled answer against the others; 1: copies (sacrebleu)", "lower"),
    "length_words": Kind("narrower", "mean words of sampled answers", "", ".1f"),
    "length_spread": Kind("narrower", "standard deviation ÷ mean of their lengths", ""),
    "opening_entropy": Kind("narrower", "bits in their first three words", "higher", ".2f"),
    "prose_share": Kind("narrower", "share of them that is prose: no list, table, code or JSON", "", ".1%"),
    "memorized_share": Kind("memorized", "training answers of 8 words or more that are given back word for word", "lower", ".1%"),  # noqa: E501
    "heldout_repeated": Kind("memorized", "the same of held-out answers, which it gives without having read them", "", ".1%"),  # noqa: E501
    "longest_copy": Kind("memorized", "most words in a row that an answer to a training prompt copies", "lower", ",.0f"),  # noqa: E501
    "train_loss": Kind("memorized", "nats a trained token of training rows", "lower"),
    "train_valid_gap": Kind("memorized", "held-out loss less training loss, in nats a token", "lower"),
    "constraints_followed": Kind("instructions", "share of checkable constraints that answers keep (IFEval, strict)", "higher", ".1%"),  # noqa: E501
    "prompts_followed": Kind("instructions", "share of prompts of which all constraints are kept", "higher", ".1%"),
    "ends_share": Kind("clean", "share of answers that end by themselves before --max-tokens", "higher", ".1%"),
    "personal_data": Kind("clean", "answers with personal data or secrets that training rows hold", "lower", ",.0f"),
}  # fmt: skip

# Fewer rows that all changed to one side happen by chance in more than 5 of 100 cases (sign test: 2 · 2⁻⁶ = 3 %).
FEWEST_ROWS = 6

ALONE = ("win_rate", "forgetting")  # of the tuned model only: they compare it with the base already


@dataclass(frozen=True)
class Metric:
    """A measured value; `low` and `high` bound the change (of a metric that is ALONE, the value) with 95 %.

    `count`: over how many rows, prompts or answers.
    """

    base: float | None
    tuned: float
    count: int
    low: float | None = None
    high: float | None = None
    base_low: float | None = None
    base_high: float | None = None
    tuned_low: float | None = None
    tuned_high: float | None = None

    @classmethod
    def of(cls, found: Paired, count: int) -> Metric:
        base, tuned, change = found.base, found.tuned, found.change
        return cls(
            base.value, tuned.value, count, change.low, change.high, base.low, base.high, tuned.low, tuned.high
        )  # fmt: skip

    @property
    def change(self) -> float | None:
        return None if self.base is None else self.tuned - self.base

    def rounded(self) -> Metric:
        """To six digits: what a card keeps."""
        values = {name: _rounded(value) for name, value in vars(self).items() if name != "count"}
        return replace(self, **values)


def verdict_of(name: str, metric: Metric) -> Literal["better", "worse", ""]:
    """Whether the change lies beyond its interval, or, without one, whether there is any; empty where neither.

    Less than FEWEST_ROWS decide nothing where there is an interval, or would be over more of them.
    """
    better, resampled = METRICS[name].better, metric.low is not None or METRICS[name].section == "narrower"
    if not better or metric.base is None or (resampled and metric.count < FEWEST_ROWS):
        return ""
    low, high = (metric.low, metric.high) if metric.low is not None else (metric.change, metric.change)
    assert low is not None
    assert high is not None
    if low > 0 or high < 0:
        return "better" if (low > 0) == (better == "higher") else "worse"
    return ""


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value
