"""IFEval's constraints, each with texts that keep to it and texts that do not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlxsft.evaluation.constraints import CONSTRAINTS, follows, is_in, known, problem, sentences

CASES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "keywords:existence": ({"keywords": ["sun", "Rain"]}, ["Rain, then SUN."], ["Only sun.", ""]),
    "keywords:frequency": (
        {"relation": "at least", "keyword": "dog", "frequency": 2},
        ["A dog sees a Dog."],
        ["One dog."],
    ),
    "keywords:forbidden_words": (
        {"forbidden_words": ["cold", "ice cream"]},
        ["It is scolding hot."],
        ["It is Cold.", "no ice cream"],
    ),
    "keywords:letter_frequency": (
        {"letter": "!", "let_relation": "less than", "let_frequency": 2},
        ["Hi!"],
        ["Hi!!"],
    ),
    "length_constraints:number_words": (
        {"relation": "at least", "num_words": 4},
        ["one two three four"],
        ["one, two, three!"],
    ),
    "length_constraints:number_sentences": (
        {"relation": "less than", "num_sentences": 3},
        ["Dr. Hall is in. So is Mr. Lee!"],
        ["One. Two. Three."],
    ),
    "length_constraints:number_paragraphs": (
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na\n***\nb\n***"],
        ["a\n\nb", "a *** b *** c", "a *** *** b"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Later"},
        ['First.\n\n"later, it rained.'],
        ["First.\n\nThen later.", "Later.", "a\n\nlater\n\nc"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [town]"], ["[name] of (town)"]),
    "detectable_content:postscript": (
        {"postscript_marker": "P.S."},
        ["Bye.\nP.S. Call me.", "Bye. P. S. yes"],
        ["Bye.", "The CPS. is big"],
    ),
    "detectable_format:number_bullet_lists": (
        {"num_bullets": 2},
        ["* a\n* b", "- a\n- b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    "detectable_format:number_highlighted_sections": (
        {"num_highlights": 2},
        ["*a* and **b c**"],
        ["*a* and b", "** **x**"],
    ),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2},
        ["SECTION 1\na\nSECTION 2\nb"],
        ["SECTION 1\na", "section 1 section 2"],
    ),
    "detectable_format:json_format": ({}, ['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", "Here: {}"]),
    "detectable_format:title": ({}, ["<<Sea>>\nwaves"], ["<Sea>", "<< >>"]),
    "detectable_format:constrained_response": ({}, ["Well. My answer is no."], ["No."]),
    "combination:two_responses": ({}, ["a ****** b"], ["a", "a ****** a", "a ****** b ****** c", "******a"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Hi! Say hi."]),
    "startend:end_checker": ({"end_phrase": "That is all."}, ['So. THAT is all."'], ["That is all. Bye."]),
    "startend:quotation": ({}, ['"Yes."'], ['"Yes.', '"']),
    "change_case:english_capital": ({}, ["WET FLOOR!"], ["Wet floor", "DER HUND IST NICHT IN DEM HAUS"]),
    "change_case:english_lowercase": ({}, ["all is quiet."], ["All is quiet", "1234"]),
    "change_case:capital_word_frequency": (
        {"capital_relation": "at least", "capital_frequency": 2},
        ["NEVER do THAT."],
        ["NEVER do that."],
    ),
    "punctuation:no_comma": ({}, ["One two."], ["One, two."]),
    "language:response_language": (
        {"language": "de"},
        ["Der Himmel ist nicht blau und die Sonne ist weg."],
        ["The sky is not blue and the sun is gone."],
    ),
}
LANGUAGES = {
    "kn": "ಇದು ಒಂದು ಪುಸ್ತಕ", "pa": "ਇਹ ਇੱਕ ਕਿਤਾਬ ਹੈ", "ko": "이것은 책입니다", "th": "นี่คือหนังสือ",
    "hi": "यह एक किताब है और वह घर में है", "mr": "हे एक पुस्तक आहे आणि ते घरात आहे", "ne": "यो एक किताब हो र घरमा छ",
    "ar": "هذا كتاب في البيت من الورق", "fa": "این کتاب است و در خانه را می", "ur": "یہ ایک کتاب ہے اور گھر میں ہے",
    "ru": "Это книга, и она не в доме, как вы", "bg": "Това е книга и тя не са на масата за да се",
    "vi": "Đây là một cuốn sách và không có những", "sw": "Hii ni kitabu cha mtoto na ni kwa wa", "it": "Il libro è "
    "nella casa e non è in una scuola", "pt": "O livro não está em uma casa, mas é para você",
    "fi": "Kirja on talossa ja hän ei ole se, mutta on",
}  # fmt: skip


def test_every_constraint_has_cases() -> None:
    assert set(CASES) == set(CONSTRAINTS)
    assert len(CONSTRAINTS) == 25


@pytest.mark.parametrize("name", CASES)
def test_texts_that_keep_to_a_constraint_are_told_from_those_that_do_not(name: str) -> None:
    given, passing, failing = CASES[name]
    assert problem(name, given) is None
    assert [follows(f"en:{name}", given, text) for text in passing] == [True] * len(passing)
    assert [follows(name, given, text) for text in failing] == [False] * len(failing)


@pytest.mark.parametrize("code", LANGUAGES)
def test_a_language_is_told_from_all_others(code: str) -> None:
    assert [other for other in LANGUAGES if is_in(LANGUAGES[code], other)] == [code]


def test_sentences_end_on_their_signs_and_not_on_abbreviations() -> None:
    assert sentences("Dr. Hall came. Why? Nobody knows") == ["Dr. Hall came.", "Why?", "Nobody knows"]


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("keywords:existence", {}, "keywords"),
        ("keywords:frequency", {"relation": "about", "keyword": "a", "frequency": 1}, "relation"),
        ("length_constraints:number_words", {"relation": "at least", "num_words": "many"}, "many"),
        ("language:response_language", {"language": "tlh"}, "tlh"),
    ],
)
def test_arguments_that_make_no_sense_are_named(name: str, given: dict[str, Any], words: str) -> None:
    said = problem(name, given)
    assert said is not None
    assert words in said


def test_every_published_constraint_is_known_and_takes_its_arguments(real: Path) -> None:
    lines = (real / "data" / "prompts" / "ifeval_en.jsonl").read_text(encoding="utf-8").splitlines()
    given = [c for r in map(json.loads, lines) for c in zip(r["instruction_id_list"], r["kwargs"], strict=True)]
    assert len(given) == 834
    assert all(known(name) for name, _ in given)
    assert [p for name, arguments in given if (p := problem(name, arguments))] == []
