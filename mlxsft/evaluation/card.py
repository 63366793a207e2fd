"""What two models did → the card: metrics with intervals, answers side by side, warnings, a verdict."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlxsft.chat.generate import Answer
from mlxsft.data.patterns import hidden
from mlxsft.errors import InputRefused
from mlxsft.evaluation import diversity, memorized, overlap
from mlxsft.evaluation.benchmarks import Benchmark
from mlxsft.evaluation.constraints import follows
from mlxsft.evaluation.intervals import Estimate, Paired, Statistic, difference, halves, mean, paired
from mlxsft.evaluation.measure import Measured, Work
from mlxsft.evaluation.metrics import FEWEST_ROWS, Metric, verdict_of
from mlxsft.evaluation.rows import Asked
from mlxsft.evaluation.rules import score

VERSION = 1
JSON_NAME, PAGE_NAME = "card.json", "card.html"

# From where on a change is worth a warning.
FORGOT_NATS = 0.05  # a token of the general texts
NARROWER_SHARE = 0.7  # of the base's distinct pairs of words, or of its bits of openings
MEMORIZED_SHARE = 0.5  # of long training answers, beyond what the base gives back and what is right of held-out ones
GAP_NATS = 0.5  # a token, that held-out rows are harder than trained ones, beyond what they were
ENDS_SHARE = 0.9


@dataclass(frozen=True)
class SideBySide:
    """One prompt with both answers; scores are those of its rules, or of its constraints, 0 to 1."""

    set: str  # heldout | training | probe | instructions
    place: str
    category: str
    prompt: str
    reference: str
    base: str
    tuned: str
    base_ends: bool
    tuned_ends: bool
    base_score: float | None = None
    tuned_score: float | None = None
    won: float | None = None  # 1: the tuned answer; 0: the base's; ½: neither


@dataclass(frozen=True)
class Group:
    """A part of the held-out prompts: a category, or those with a rule."""

    name: str
    measure: str  # what base and tuned are
    base: float
    tuned: float
    count: int
    low: float | None = None  # of the change, with 95 %
    high: float | None = None


@dataclass(frozen=True)
class Card:
    """Everything that an evaluation found. It depends on the run, the settings and the seed, and on no clock."""

    run: str
    adapter: str  # SHA-256 of its tensors
    model: str
    backend: str
    mlxsft: str
    settings: dict[str, Any]
    metrics: dict[str, Metric]
    verdict: str
    good: bool  # better, without a warning
    warnings: list[str]
    notes: list[str]
    groups: list[Group] = field(default_factory=list)
    forms: dict[str, tuple[float, float]] = field(default_factory=dict)  # share of sampled answers, before and after
    answers: list[SideBySide] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)  # hashes and versions of what decides the rest, by its name
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_card(path: Path, adapter: str) -> Card:
    """A card that was written before. Raises InputRefused for what is none, and for a card of another adapter."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}, expected {VERSION}")
        values["metrics"] = {name: Metric(**metric) for name, metric in values["metrics"].items()}
        values["groups"] = [Group(**group) for group in values["groups"]]
        values["answers"] = [SideBySide(**answer) for answer in values["answers"]]
        values["benchmarks"] = [Benchmark(**found) for found in values["benchmarks"]]
        values["forms"] = {name: (before, after) for name, (before, after) in values["forms"].items()}
        card = Card(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputRefused(f"{path}: this card cannot be read: {error}", "--force makes it anew.") from error
    if card.adapter != adapter:
        raise InputRefused(f"{path}: this card is of another adapter than the run has now", "--force makes it anew.")
    return card


@dataclass(frozen=True)
class Findings:
    """What both models did, made into metrics; `wins` are a judge's, where there is one."""

    work: Work
    base: Measured
    tuned: Measured
    seed: int
    training_texts: Callable[[], Iterable[str]] = tuple
    wins: Sequence[float] | None = None

    def metrics(self) -> dict[str, Metric]:
        """By name, all that could be measured."""
        found = {
            **self._losses(),
            **self._tasks(),
            **self._probe(),
            **self._variety(),
            **self._memorized(),
            **self._instructions(),
            **self._clean(),
        }
        return {name: metric.rounded() for name, metric in found.items() if math.isfinite(metric.tuned)}

    # --- better ------------------------------------------------------------------------------------------------------

    def _losses(self) -> dict[str, Metric]:
        found = self._loss("heldout")
        if found is None:
            return {}
        loss, count = found
        perplexity = Paired(_exponential(loss.base), _exponential(loss.tuned), loss.change)
        metric = Metric.of(perplexity, count)
        # An interval of the ratio is one of the loss's change; of the difference there is none that is paired.
        low, high = (
            perplexity.base.value * (math.exp(bound) - 1) for bound in (loss.change.low, loss.change.high)
        )  # fmt: skip
        return {
            "heldout_loss": Metric.of(loss, count),
            "heldout_perplexity": Metric(**{**vars(metric), "low": low, "high": high}),
        }

    def _loss(self, kind: str) -> tuple[Paired, int] | None:
        """The loss of a set with its intervals, and how many rows it has; None where there are none."""
        before, after = self.base.losses.get(kind), self.tuned.losses.get(kind)
        if before is None or after is None:
            return None
        return paired(before.nats, after.nats, before.tokens, seed=self.seed), len(before.tokens)

    def _rows(self, kind: str) -> list[NDArray[np.float64]]:
        """(nats before, nats after, tokens) of the rows of a set."""
        before, after = self.base.losses[kind], self.tuned.losses[kind]
        return [before.nats, after.nats, before.tokens]

    def _tasks(self) -> dict[str, Metric]:
        asked = self.work.heldout.asked
        ruled = [i for i, row in enumerate(asked) if row.rules]
        found = {"task_score": self._scored("heldout", ruled)} if ruled else {}
        if asked:
            for name, measure in self._overlaps().items():
                before, after = (
                    [measure(a.text, row.reference) for row, a in zip(asked, side.answers["heldout"], strict=True)]
                    for side in (self.base, self.tuned)
                )
                found[name] = self._of_each(before, after)
            won = mean(self.won(), seed=self.seed)
            found["win_rate"] = Metric(None, won.value, len(asked), won.low, won.high)
        return found

    def _of_each(self, base: Sequence[float], tuned: Sequence[float]) -> Metric:
        """The mean over rows, prompts or answers that are given in the same order."""
        return Metric.of(paired(base, tuned, np.ones(len(base)), seed=self.seed), len(base))

    @staticmethod
    def _overlaps() -> dict[str, Callable[[str, str], float]]:
        """What of an answer is in the row's own; with sacrebleu's where that is installed."""
        found: dict[str, Callable[[str, str], float]] = {"exact": _same, "rouge_l": overlap.rouge_l}
        if overlap.has_sacrebleu():
            found |= {"chrf": overlap.chrf, "bleu": lambda answer, reference: overlap.bleu(answer, [reference])}
        return found

    def won(self) -> list[float]:
        """Which answer to each held-out prompt is better: as the judge says, else by the rules of the rows."""
        if self.wins is not None:
            return list(self.wins)
        sides = zip(*(self._row_scores("heldout", side) for side in (self.base, self.tuned)), strict=True)
        return [0.5 + ((after > before) - (after < before)) / 2 for before, after in sides]

    def _row_scores(self, kind: str, side: Measured) -> list[float]:
        """How right each answer of a set is: by its rules, else by its words in common with the row's own."""
        return [_right(row, a) for row, a in zip(self.work.asked[kind], side.answers[kind], strict=True)]

    def _scored(self, kind: str, rows: Sequence[int]) -> Metric:
        before, after = (self._row_scores(kind, side) for side in (self.base, self.tuned))
        return self._of_each([before[i] for i in rows], [after[i] for i in rows])

    # --- forgotten ---------------------------------------------------------------------------------------------------

    def _probe(self) -> dict[str, Metric]:
        found: dict[str, Metric] = {}
        if (judged := self._loss("probe")) is not None:
            loss, count = judged
            found["probe_loss"] = Metric.of(loss, count)
            found["forgetting"] = Metric(None, loss.change.value, count, loss.change.low, loss.change.high)
        if ruled := [i for i, row in enumerate(self.work.probe.asked) if row.rules]:
            found["probe_score"] = self._scored("probe", ruled)
        return found

    # --- narrower ----------------------------------------------------------------------------------------------------

    def _variety(self) -> dict[str, Metric]:
        before, after = ([answer.text for answer in side.sampled] for side in (self.base, self.tuned))
        if len(after) < 2:
            return {}
        found = {
            name: self._whole(partial(_of, measure, before), partial(_of, measure, after), len(after))
            for name, measure in _VARIETY.items()
        }
        if overlap.has_sacrebleu():
            found["self_bleu"] = self._whole(overlap.SelfBleu(before).of, overlap.SelfBleu(after).of, len(after))
        return {name: metric for name, metric in found.items() if metric is not None}

    def _whole(self, base: Statistic, tuned: Statistic, count: int) -> Metric | None:
        """A statistic of all answers together, with an interval from halves of them."""
        everything = np.arange(count)
        if count >= FEWEST_ROWS and (found := halves(base, tuned, count, seed=self.seed)) is not None:
            return Metric.of(found, count)
        after = tuned(everything)
        return None if after is None else Metric(base(everything), after, count)

    def forms(self) -> dict[str, tuple[float, float]]:
        """The share of sampled answers in each form, before and after."""
        if not self.tuned.sampled:
            return {}
        before, after = (diversity.forms([a.text for a in side.sampled]) for side in (self.base, self.tuned))
        return {name: (before[name], after[name]) for name in before if before[name] or after[name]}

    # --- memorized ---------------------------------------------------------------------------------------------------

    def _memorized(self) -> dict[str, Metric]:
        found: dict[str, Metric] = {}
        asked = self.work.training.asked
        sides = [side.answers["training"] for side in (self.base, self.tuned)]
        for name, kind in (("memorized_share", "training"), ("heldout_repeated", "heldout")):
            if (repeated := self._repeated(kind)) is not None:
                found[name] = repeated
        if asked:
            before, after = (
                max(memorized.longest_copy(a.text, row.reference) for row, a in zip(asked, side, strict=True))
                for side in sides
            )
            found["longest_copy"] = Metric(float(before), float(after), len(asked))
        if (trained := self._loss("training")) is not None:
            found["train_loss"] = Metric.of(*trained)
            if (held := self._loss("heldout")) is not None:
                rows = [self._rows(kind) for kind in ("heldout", "training")]
                count = min(held[1], trained[1])
                found["train_valid_gap"] = Metric.of(difference(*rows, seed=self.seed), count)
        return found

    def _repeated(self, kind: str) -> Metric | None:
        """The share of a set's long answers that are given word for word; None where it has none."""
        asked = self.work.asked[kind]
        if not (long := [i for i, row in enumerate(asked) if memorized.is_long(row.reference)]):
            return None
        sides = [side.answers[kind] for side in (self.base, self.tuned)]
        return self._of_each(*([memorized.repeats(s[i].text, asked[i].reference) for i in long] for s in sides))

    # --- instructions ------------------------------------------------------------------------------------------------

    def _instructions(self) -> dict[str, Metric]:
        asked = self.work.instructions
        if not asked:
            return {}
        kept = [self._kept(side) for side in (self.base, self.tuned)]
        counts = [len(row.constraints) for row in asked]
        every = [[k == n for k, n in zip(side, counts, strict=True)] for side in kept]
        return {
            "constraints_followed": Metric.of(paired(kept[0], kept[1], counts, seed=self.seed), sum(counts)),
            "prompts_followed": self._of_each(*every),
        }

    def _kept(self, side: Measured) -> list[int]:
        """How many constraints each answer keeps."""
        answers = zip(self.work.instructions, side.answers["instructions"], strict=True)
        return [sum(follows(name, given, a.text) for name, given in row.constraints) for row, a in answers]

    # --- clean -------------------------------------------------------------------------------------------------------

    def _clean(self) -> dict[str, Metric]:
        ended = [[a.finish == "stop" for a in side.all_answers] for side in (self.base, self.tuned)]
        if not ended[0]:
            return {}
        leaks = [float(len({i for i, _, _ in self._leaks(side)})) for side in (self.base, self.tuned)]
        return {
            "ends_share": self._of_each(*ended),
            "personal_data": Metric(leaks[0], leaks[1], len(ended[0])),
        }

    def _leaks(self, side: Measured) -> list[tuple[int, str, str]]:
        prompts = [row.prompt for asked in self.work.asked.values() for row in asked]
        prompts += [row.prompt for row in self.work.sampled]
        texts = [answer.text for answer in side.all_answers]
        return list(memorized.leaked(list(zip(prompts, texts, strict=True)), self.training_texts()))

    def leaks(self) -> list[str]:
        """What personal data of training rows the tuned model's answers hold, hidden but for the beginning."""
        return list(dict.fromkeys(f"{kind} {hidden(text)}" for _, kind, text in self._leaks(self.tuned)))

    # --- parts and answers -------------------------------------------------------------------------------------------

    def groups(self) -> list[Group]:
        """The held-out prompts by category, and by rule, where there are any."""
        asked = self.work.heldout.asked
        before, after = (self._row_scores("heldout", side) for side in (self.base, self.tuned))
        groups = []
        for name in dict.fromkeys(row.category for row in asked if row.category):
            rows = [i for i, row in enumerate(asked) if row.category == name]
            how = "rules" if any(asked[i].rules for i in rows) else "rouge_l"
            groups.append(self._group(name, how, [before[i] for i in rows], [after[i] for i in rows]))
        for kind in dict.fromkeys(kind for row in asked for kind in row.rules):
            sides = [
                [
                    score({kind: row.rules[kind]}, answer.text, row.reference)[kind]
                    for row, answer in zip(asked, side.answers["heldout"], strict=True)
                    if kind in row.rules
                ]
                for side in (self.base, self.tuned)
            ]
            groups.append(self._group(f"rule: {kind}", kind, *sides))
        return groups

    def _group(self, name: str, measure: str, base: Sequence[float], tuned: Sequence[float]) -> Group:
        metric = self._of_each(base, tuned).rounded()
        assert metric.base is not None
        return Group(name, measure, metric.base, metric.tuned, len(base), metric.low, metric.high)

    def answers(self) -> list[SideBySide]:
        """Every prompt that was asked, with both greedy answers."""
        won = self.won() if self.work.heldout.asked else []
        found = []
        for kind, asked in self.work.asked.items():
            sides = [side.answers[kind] for side in (self.base, self.tuned)]
            scores = [[_shown_score(row, a) for row, a in zip(asked, side, strict=True)] for side in sides]
            for i, row in enumerate(asked):
                before, after = sides[0][i], sides[1][i]
                found.append(
                    SideBySide(
                        kind, row.place, row.category, row.prompt, row.reference, before.text, after.text,
                        before.finish == "stop", after.finish == "stop", scores[0][i], scores[1][i],
                        won[i] if kind == "heldout" else None,
                    )
                )  # fmt: skip
        return found


def warnings_of(metrics: Mapping[str, Metric], leaks: Sequence[str]) -> list[str]:
    """What somebody should know before this adapter is used, as sentences; the most serious first."""
    said = []

    def tell(name: str, sentence: str, *, when: bool) -> None:
        if when and name in metrics:
            said.append(sentence)

    def at(name: str) -> Metric:
        return metrics.get(name, Metric(0.0, 0.0, 0))

    loss, forgetting, leaked = at("heldout_loss"), at("forgetting"), at("personal_data")
    tell("personal_data", f"{leaked.tuned:.0f} answers hold personal data of training rows: {', '.join(leaks)}",
         when=leaked.tuned > 0)  # fmt: skip
    tell("heldout_loss", "it is worse on held-out rows than the base",
         when=verdict_of("heldout_loss", loss) == "worse")  # fmt: skip
    tell("forgetting", f"generalization is paid for specialization: the loss on general texts rose by "
         f"{forgetting.tuned:.2f} nats a token; fewer epochs, a lower learning rate or general rows among yours help",
         when=(forgetting.low or 0) > 0 and forgetting.tuned > FORGOT_NATS)  # fmt: skip
    for name, what in (("probe_score", "general questions"), ("constraints_followed", "checkable instructions")):
        tell(name, f"it is worse at {what} than the base", when=verdict_of(name, at(name)) == "worse")
    for name, what in (("distinct_2", "the pairs of words"), ("opening_entropy", "the openings")):
        metric = at(name)
        fell = metric.tuned < NARROWER_SHARE * (metric.base or 0) and verdict_of(name, metric) == "worse"
        tell(name, f"its answers are more alike: {what} vary at {metric.tuned:.2f}, where the base's do at "
             f"{metric.base or 0:.2f}", when=fell)  # fmt: skip
    share, unread, gap = at("memorized_share"), at("heldout_repeated"), at("train_valid_gap")
    by_heart = share.tuned - max(share.base or 0, unread.tuned)  # what is right anyway was not learned by heart
    wider = (gap.change or 0) > GAP_NATS and (gap.low is None or gap.low > 0)
    others = f", and {unread.tuned:.0%} of held-out ones" * ("heldout_repeated" in metrics)
    tell("memorized_share", f"it gives {share.tuned:.0%} of long training answers back word for word{others}",
         when=by_heart > MEMORIZED_SHARE)  # fmt: skip
    tell("train_valid_gap", f"held-out rows are {gap.tuned:.2f} nats a token harder for it than trained ones "
         f"({gap.base or 0:.2f} for the base)", when=wider)  # fmt: skip
    ends = at("ends_share")
    tell("ends_share", f"only {ends.tuned:.0%} of its answers end by themselves", when=ends.tuned < ENDS_SHARE)
    return said


def verdict(metrics: Mapping[str, Metric], warnings: Sequence[str]) -> str:
    """The card in a sentence."""
    loss = metrics.get("heldout_loss")
    if loss is None or loss.base is None:
        found = "Nothing was held out, so that nothing says whether it became better"
    elif loss.count < FEWEST_ROWS:
        found = f"{loss.count} held-out rows are too few to tell: {loss.base:.3f} → {loss.tuned:.3f} nats a token"
    else:
        how = {"better": "Better", "worse": "Worse"}.get(verdict_of("heldout_loss", loss), "Not measurably different")
        found = f"{how} on held-out rows: {loss.base:.3f} → {loss.tuned:.3f} nats a token"
    if (won := metrics.get("win_rate")) is not None and won.count >= FEWEST_ROWS:
        found += f", {won.tuned:.0%} of the answers won"
    if not warnings:
        return f"{found}. No warning."
    return f"{found}. {len(warnings)} warning{'s' * (len(warnings) > 1)}: {'; '.join(warnings)}."


def _exponential(side: Estimate) -> Estimate:
    """A perplexity: of a float, no more than e⁷⁰⁰ is finite."""
    value, low, high = (math.exp(min(loss, 700.0)) for loss in (side.value, side.low, side.high))
    return Estimate(value, low, high)


_VARIETY: Mapping[str, Callable[[Sequence[str]], float | None]] = {
    "distinct_1": lambda texts: diversity.distinct(texts, 1),
    "distinct_2": lambda texts: diversity.distinct(texts, 2),
    "length_words": lambda texts: sum(len(diversity.words_of(t)) for t in texts) / len(texts),
    "length_spread": diversity.length_spread,
    "opening_entropy": diversity.opening_entropy,
    "prose_share": lambda texts: diversity.forms(texts)["prose"],
}


def _of(
    measure: Callable[[Sequence[str]], float | None], texts: Sequence[str], chosen: NDArray[np.int64]
) -> float | None:
    return measure([texts[i] for i in chosen])


def _same(answer: str, reference: str) -> float:
    return float(" ".join(answer.split()) == " ".join(reference.split()))


def _right(row: Asked, answer: Answer) -> float:
    if not row.rules:
        return overlap.rouge_l(answer.text, row.reference)
    scores = score(row.rules, answer.text, row.reference)
    return sum(scores.values()) / len(scores)


def _shown_score(row: Asked, answer: Answer) -> float | None:
    """How right the answer is, where rules or constraints say so."""
    if row.constraints:
        kept = [follows(name, given, answer.text) for name, given in row.constraints]
        return _rounded(sum(kept) / len(kept))
    return _rounded(_right(row, answer)) if row.rules else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
