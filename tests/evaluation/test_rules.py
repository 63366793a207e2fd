"""Rules for right answers, and how much an answer and its reference have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlxsft.errors import InputRefused
from mlxsft.evaluation.overlap import SelfBleu, bleu, chrf, rouge_l
from mlxsft.evaluation.rules import checked, read_rules, score

SCHEMA = {"type": "object", "required": ["price"], "properties": {"price": {"type": "number"}}}


@pytest.mark.parametrize(
    ("rules", "right", "wrong"),
    [
        ({"exact": True}, "The lamp.", "the lamp."),
        ({"exact": ["A", "B"]}, " B\n", "C"),
        ({"contains": ["39 euros", "Lamp"]}, "The lamp is 39 Euros.", "The lamp is 40 euros."),
        ({"excludes": "sorry"}, "Yes.", "Sorry, no."),
        ({"regex": r"\d+ g\b"}, "It is 20 g.", "It is 20 grams."),
        ({"json": True}, '{"a": 1}', "{'a': 1}"),
        ({"json": True}, "[]", "NaN"),
        ({"json_schema": SCHEMA}, '{"price": 3}', '{"price": "3"}'),
        ({"json_schema": SCHEMA}, '{"price": 3}', "3 euros"),
        ({"rouge_l": 0.6}, "the lamp here", "a chair"),
        ({"chrf": 0.5}, "The lamp!", "Chairs"),
    ],
)
def test_a_rule_tells_right_from_wrong(rules: dict[str, Any], right: str, wrong: str) -> None:
    kept = checked(rules, "here")
    assert list(score(kept, right, "The lamp.").values()) == [1.0]
    assert list(score(kept, wrong, "The lamp.").values()) == [0.0]


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"contain": "x"}, "'contain' is no rule"),
        ({"contains": 3}, "expected a text"),
        ({"regex": "("}, "no regular expression"),
        ({"json": False}, "expected true"),
        ({"json_schema": {"type": "nothing"}}, "no JSON Schema"),
        ({"rouge_l": 2}, "up to 1"),
        (["json"], "expected an object"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_place(rules: Any, words: str) -> None:
    with pytest.raises(InputRefused, match=r"rows\.jsonl:3: check") as refused:
        checked(rules, "rows.jsonl:3: check")
    assert words in refused.value.message


def test_a_regular_expression_that_would_take_years_is_given_up() -> None:
    assert score({"regex": "(a|aa)+$"}, "a" * 60 + "!", "") == {"regex": 0.0}


def test_a_schema_is_never_fetched_from_the_network() -> None:
    rules = checked({"json_schema": {"$ref": "http://127.0.0.1:9/schema.json"}}, "here")
    with pytest.raises(InputRefused, match=r"127\.0\.0\.1"):
        score(rules, "{}", "")


def test_a_file_has_rules_for_categories_and_for_all_and_a_rows_own_go_first(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"rules": {"json": True}, "categories": {"slogan": {"regex": "!$"}}}))
    book = read_rules(path)
    assert book.of({}, "slogan") == {"regex": "!$"}
    assert book.of({}, "other") == {"json": True}
    assert book.of({"exact": "A"}, "slogan") == {"exact": "A"}
    path.write_text(json.dumps({"json": True}))
    with pytest.raises(InputRefused, match="rules and categories"):
        read_rules(path)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "police killed the gunman" of https://aclanthology.org/W04-1013: 3 of 4 words in order, then 2 of 4
    assert rouge_l("police kill the gunman", "police killed the gunman") == 0.75
    assert rouge_l("the gunman kill police", "police killed the gunman") == 0.5
    assert rouge_l("", "anything") == 0


@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_rouge_l_is_symmetric_and_1_only_for_the_same_words(a: list[str], b: list[str]) -> None:
    said, meant = " ".join(a), " ".join(b)
    assert rouge_l(said, meant) == rouge_l(meant, said)
    assert (rouge_l(said, meant) == 1) == (a == b != [])


def test_chrf_and_bleu_are_sacrebleus() -> None:
    import sacrebleu

    answer, reference = "The cat sat on the mat.", "The cat is on the mat."
    assert chrf(answer, reference) == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score / 100)
    assert bleu(answer, [reference]) == pytest.approx(sacrebleu.sentence_bleu(answer, [reference]).score / 100)


def test_self_bleu_is_1_for_copies_and_near_0_for_strangers() -> None:
    def self_bleu(answers: list[str]) -> float | None:
        return SelfBleu(answers).of(np.arange(len(answers)))

    assert self_bleu(["the same long answer here"] * 3) == pytest.approx(1)
    strangers = self_bleu(["one two three four", "five six seven eight"])
    assert strangers is not None
    assert strangers < 0.1
    assert self_bleu(["alone"]) is None
    assert self_bleu(["", ""]) == 0


def test_self_bleu_of_some_answers_is_the_mean_of_sacrebleus_sentences() -> None:
    random = np.random.default_rng(0)
    words = ["a", "b", "the", "lamp", "red", "is", "is", "39.90", "euros,", "(new)"]
    answers = [" ".join(random.choice(words, random.integers(0, 12))) for _ in range(9)]
    found = SelfBleu(answers)
    for chosen in (np.arange(9), np.array([0, 2, 5, 6]), np.array([7, 8])):
        texts = [answers[i] for i in chosen]
        expected = [bleu(text, [*texts[:i], *texts[i + 1 :]]) for i, text in enumerate(texts)]
        assert found.of(chosen) == pytest.approx(sum(expected) / len(expected))
