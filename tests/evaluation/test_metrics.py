"""Intervals, variety, copies, requirements and warnings, on numbers that can be worked out by hand."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
from rich.console import Console

from mlxsft.errors import UsageError
from mlxsft.evaluation.card import Card, Group, verdict, warnings_of
from mlxsft.evaluation.card_page import page
from mlxsft.evaluation.card_text import print_card, shown_value
from mlxsft.evaluation.diversity import distinct, forms, length_spread, opening_entropy
from mlxsft.evaluation.intervals import difference, halves, mean, paired
from mlxsft.evaluation.memorized import leaked, longest_copy, repeats
from mlxsft.evaluation.metrics import METRICS, Metric, verdict_of
from mlxsft.evaluation.requirements import Requirement

# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_rows() -> None:
    values = np.random.default_rng(0).normal(3, 2, 4000)
    found = mean(values, seed=1)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.06)


def test_pairs_are_drawn_together_so_that_hard_rows_do_not_widen_the_interval_of_the_change() -> None:
    random = np.random.default_rng(0)
    hardness, tokens = random.normal(20, 10, 300), random.integers(1, 9, 300)
    found = paired(hardness * tokens, (hardness - 1) * tokens, tokens, seed=0)
    assert found.change.value == pytest.approx(-1)
    assert found.change.high - found.change.low < 1e-9  # every row changed by the same
    assert found.base.high - found.base.low > 1


def test_about_95_of_100_intervals_hold_the_true_change() -> None:
    held = 0
    for trial in range(100):
        random = np.random.default_rng(trial)
        base = random.exponential(2, 60)
        found = paired(base, base + random.normal(0.3, 1, 60), np.ones(60), seed=trial).change
        held += found.low <= 0.3 <= found.high
    assert 87 <= held <= 100  # binomial(100, 0.95) within three standard deviations, and a little for 60 rows


def test_a_seed_gives_the_same_interval_and_no_rows_give_none() -> None:
    assert mean([1, 2, 4], seed=3) == mean([1, 2, 4], seed=3)
    with pytest.raises(ValueError, match="no rows"):
        mean([], seed=0)


def test_two_sets_of_rows_are_resampled_by_themselves() -> None:
    random = np.random.default_rng(0)
    one, other = random.normal(3, 1, 400), random.normal(2, 2, 300)
    found = difference((one, one - 1, np.ones(400)), (other, other, np.ones(300)), seed=0)
    assert found.base.value == pytest.approx(one.mean() - other.mean())
    assert found.change.value == pytest.approx(-1)
    half = 1.96 * math.sqrt(1 / 400 + 4 / 300)
    assert (found.base.high - found.base.low) / 2 == pytest.approx(half, rel=0.12)
    assert found.change.high - found.change.low < 1e-9


def test_halves_of_a_mean_spread_as_its_bootstrap_does() -> None:
    random = np.random.default_rng(0)
    base = random.normal(0, 1, 80)
    tuned = base + random.normal(0.5, 1, 80)
    by_halves = halves(lambda i: float(base[i].mean()), lambda i: float(tuned[i].mean()), 80, seed=0)
    by_rows = paired(base, tuned, np.ones(80), seed=0)
    assert by_halves is not None
    for one, other in ((by_halves.change, by_rows.change), (by_halves.base, by_rows.base)):
        assert one.value == pytest.approx(other.value)
        assert one.high - one.low == pytest.approx(other.high - other.low, rel=0.15)


def test_about_95_of_100_intervals_of_distinct_words_hold_the_true_change() -> None:
    """The true value is that of as many answers as there are: the more, the fewer of their words are new."""

    def answers(random: np.random.Generator, words: int) -> list[str]:
        return [" ".join(map(str, random.zipf(1.3, 12) % words)) for _ in range(40)]

    def share(texts: list[str]) -> float:
        return distinct(texts, 1) or 0.0

    truth = np.mean([
        share(answers(np.random.default_rng([1, n]), 60)) - share(answers(np.random.default_rng([2, n]), 300))
        for n in range(150)
    ])  # fmt: skip
    held, found_so, biased = 0, 0, 0
    for trial in range(40):
        random = np.random.default_rng([3, trial])
        before, after = answers(random, 300), answers(random, 60)
        found = halves(
            lambda i, texts=before: share([texts[k] for k in i]),  # type: ignore[misc]
            lambda i, texts=after: share([texts[k] for k in i]),  # type: ignore[misc]
            40, seed=trial,
        )  # fmt: skip
        assert found is not None
        held += found.change.low <= truth <= found.change.high
        found_so += found.change.high < 0
        drawn = random.integers(0, 40, (100, 40))  # with replacement, for comparison
        plain = [share([after[k] for k in i]) for i in drawn]
        biased += np.percentile(plain, 97.5) < found.tuned.value
    assert held >= 34  # binomial(40, 0.95), three standard deviations below
    assert found_so >= 30  # and they are no wider than they must be
    assert biased > 20  # copies of answers hold no new words: such an interval lies below the value that it is of


def test_a_statistic_that_is_none_has_no_interval() -> None:
    assert halves(lambda i: None, lambda i: 1.0, 8, seed=0) is None
    assert halves(lambda i: 1.0 if len(i) == 8 else None, lambda i: 1.0, 8, seed=0) is None


# --- variety and copies -----------------------------------------------------------------------------------------------


def test_variety_in_numbers() -> None:
    answers = ["a b a b", "A b, c!"]
    assert distinct(answers, 1) == 3 / 7
    assert distinct(answers, 2) == 3 / 5  # a b, b a, b c of a b, b a, a b, a b, b c
    assert distinct([""], 1) is None
    assert length_spread(["a b", "a b c d"]) == pytest.approx(1 / 3)
    assert opening_entropy(["one two three four", "One two three five", "six", "seven"]) == pytest.approx(1.5)
    assert forms(["Text.", "- a\n- b", '{"a": 1}', "More."]) == {
        "prose": 0.5, "list": 0.25, "table": 0, "code block": 0, "JSON": 0.25,
    }  # fmt: skip


def test_copies_are_found_word_by_word() -> None:
    assert repeats("the Lamp is 39 euros", "The lamp is 39 euros.")
    assert not repeats("the lamp is 40 euros", "The lamp is 39 euros.")
    assert longest_copy("so the lamp is 40 euros", "The lamp is 39 euros") == 3


def test_only_what_training_rows_hold_and_the_prompt_does_not_is_leaked() -> None:
    asked = [
        ("Who?", "Write to ada@hall-lamps.com."),
        ("Who is ben@hall-lamps.com?", "ben@hall-lamps.com is Ben."),
        ("And?", "new@invented.com"),
        ("Hello", "Hi."),
    ]
    training = ["ada@hall-lamps.com and ben@hall-lamps.com"]
    assert list(leaked(asked, training)) == [(0, "e-mail", "ada@hall-lamps.com")]


def test_training_rows_are_not_read_where_no_answer_holds_anything() -> None:
    def never() -> object:
        raise AssertionError
        yield

    assert list(leaked([("a", "b")], never())) == []  # type: ignore[arg-type]


# --- requirements -----------------------------------------------------------------------------------------------------

MEASURED = {
    "heldout_loss": Metric(4.0, 3.0, 10, low=-1.5, high=-0.5),
    "probe_loss": Metric(2.0, 2.1, 30, low=0.05, high=0.15),
    "forgetting": Metric(None, 0.1, 30, low=0.05, high=0.15),
}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("heldout_loss<0.9*base", True),
        ("heldout_loss < 0.7 * base", False),
        ("forgetting<0.05", False),
        ("forgetting<=0.1", True),
        ("heldout_loss.high<0", True),
        ("heldout_loss.change==-1", True),
        ("heldout_loss.base-heldout_loss>probe_loss.tuned/2", False),
        ("0<forgetting<0.2", True),
        ("base>heldout_loss", True),
        ("forgetting<1/0", False),
        ("win_rate>0.5", False),  # not measured: a gate does not open
        ("forgetting<base", False),  # it has none
    ],
)
def test_a_requirement_holds_or_says_why_not(text: str, holds: bool) -> None:
    failure = Requirement.parse(text).failure(MEASURED)
    assert (failure is None) == holds
    assert failure is None or failure.startswith(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("heldout_los<1", "no metric"),
        ("heldout_loss", "expected a comparison"),
        ("1<2", "no metric is named"),
        ("heldout_loss<", "expected a comparison"),
        ("heldout_loss.real<1", "only numbers"),
        ("heldout_loss.__class__<1", "only numbers"),
        ("heldout_loss<abs(-1)", "no metric"),
        ("heldout_loss<probe_loss[0]", "only numbers"),
        ("heldout_loss<2**99999999", "only numbers"),
        ("heldout_loss<'a'", "only numbers"),
        ("heldout_loss<True", "only numbers"),
        ("heldout_loss in (1, 2)", "only numbers"),
        ("heldout_loss!=1", "one of"),
        ("heldout_loss<" + "(" * 5000, "expected a comparison"),
        ("heldout_loss<(lambda: 1)()", "only numbers"),
    ],
)
def test_what_is_no_comparison_of_metrics_is_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        Requirement.parse(text)
    assert words in refused.value.message


def test_an_unknown_metric_is_told_the_known_ones() -> None:
    with pytest.raises(UsageError) as refused:
        Requirement.parse("loss<1")
    assert refused.value.hint is not None
    assert all(name in refused.value.hint for name in METRICS)


# --- warnings ---------------------------------------------------------------------------------------------------------


def test_a_change_counts_when_its_interval_does_not_hold_zero() -> None:
    assert verdict_of("heldout_loss", Metric(2.0, 1.0, 9, -1.2, -0.8)) == "better"
    assert verdict_of("heldout_loss", Metric(2.0, 3.0, 9, 0.8, 1.2)) == "worse"
    assert verdict_of("heldout_loss", Metric(2.0, 1.9, 9, -0.3, 0.1)) == ""
    assert verdict_of("ends_share", Metric(0.0, 1.0, 9, 0.8, 1.0)) == "better"
    assert verdict_of("length_words", Metric(1.0, 9.0, 9)) == ""
    assert verdict_of("heldout_loss", Metric(2.0, 1.0, 5, -1.2, -0.8)) == ""  # too few rows for an interval


@pytest.mark.parametrize(
    ("name", "metric", "words"),
    [
        ("personal_data", Metric(0.0, 2.0, 9), "personal data"),
        ("heldout_loss", Metric(2.0, 3.0, 9, 0.8, 1.2), "worse on held-out rows"),
        ("forgetting", Metric(None, 0.3, 9, 0.2, 0.4), "paid for specialization"),
        ("probe_score", Metric(0.9, 0.2, 9, -0.9, -0.4), "general questions"),
        ("constraints_followed", Metric(0.9, 0.2, 9, -0.9, -0.4), "instructions"),
        ("distinct_2", Metric(0.9, 0.5, 9), "more alike"),
        ("opening_entropy", Metric(3.0, 1.0, 9), "more alike"),
        ("memorized_share", Metric(0.0, 0.8, 9, 0.5, 0.9), "word for word"),
        ("train_valid_gap", Metric(0.1, 0.9, 9), "harder"),
        ("ends_share", Metric(0.0, 0.5, 9, 0.3, 0.7), "end by themselves"),
    ],
)
def test_each_danger_is_warned_of_and_none_without_it(name: str, metric: Metric, words: str) -> None:
    said = warnings_of({name: metric}, ["e-mail ada@…"])
    assert len(said) == 1
    assert words in said[0]
    kept = metric.base if metric.base is not None else 0.0
    unchanged = Metric(metric.base, 1.0 if name == "ends_share" else kept, 9, -0.01, 0.01)
    assert warnings_of({name: unchanged}, []) == []


def test_answers_that_are_right_of_rows_it_never_read_are_not_by_heart() -> None:
    share = Metric(0.0, 1.0, 9, 1.0, 1.0)
    unread = {right: Metric(0.0, right, 9) for right in (0.0, 0.4, 1.0)}
    said = {right: warnings_of({"memorized_share": share, "heldout_repeated": m}, []) for right, m in unread.items()}
    assert said[0.4] == ["it gives 100% of long training answers back word for word, and 40% of held-out ones"]
    assert len(said[0.0]) == 1
    assert said[1.0] == []


def test_the_page_lists_warnings_or_says_that_there_is_none() -> None:
    for warnings, shown in (
        ([], "<b>Better on held-out rows: 2.000 → 1.000 nats a token. No warning.</b></div>"),
        (["it forgets"], "<b>Better on held-out rows: 2.000 → 1.000 nats a token.</b><ul><li>It forgets.</li></ul>"),
    ):
        said = verdict({"heldout_loss": Metric(2.0, 1.0, 9, -1.2, -0.8)}, warnings)
        assert shown in page([Card("run", "", "", "", "", {}, {}, said, not warnings, warnings, [])])


def test_a_table_of_parts_fits_80_columns_and_values_keep_their_digits() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    parts = [Group("translation of prices", "rouge_l", 0.2, 1.0, 128, 0.612, 1.0)]
    print_card(Card("run", "", "", "", "", {}, {}, "Better", True, [], [], parts), console)
    head, row = (line.split() for line in console.export_text().splitlines()[:2])
    assert head[-3:] == ["95", "%", "interval"]
    assert row[-3:] == ["+61.2%", "to", "+100.0%"]
    shown = [shown_value("heldout_perplexity", value) for value in (20.0, 1.06, 123.4, 1608.0, 2e9)]
    assert shown == ["20.0", "1.06", "123", "1,608", "2.00e+09"]


def test_the_verdict_says_better_only_beyond_the_interval() -> None:
    better = {"heldout_loss": Metric(2.0, 1.0, 9, -1.2, -0.8)}
    assert verdict(better, []) == "Better on held-out rows: 2.000 → 1.000 nats a token. No warning."
    assert verdict({"heldout_loss": Metric(2.0, 1.9, 9, -0.3, 0.1)}, []).startswith("Not measurably different")
    assert "1 warning: it forgets" in verdict(better, ["it forgets"])
    assert verdict({"heldout_loss": Metric(2.0, 1.0, 5, -1.2, -0.8)}, []).startswith("5 held-out rows are too few")
    won = {"win_rate": Metric(None, 0.75, 8, 0.5, 1.0)}
    assert "75% of the answers won" in verdict(better | won, [])
    assert "won" not in verdict(better | {"win_rate": Metric(None, 0.75, 4, 0.5, 1.0)}, [])
    assert verdict({}, []).startswith("Nothing was held out")
