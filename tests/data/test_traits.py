"""What an answer shows without a model: its opening, form and language, and whether it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.data import traits


@pytest.mark.parametrize(
    "answer",
    [
        "It is so.", "Is it?", 'He said "no"', "Read (it)", "这是真的。", "Well done 🎉", "```py\nx\n```",
        "I await your reply.\n\nYours sincerely,\nJane Austen", "I await your reply. Best regards, Albert Einstein",
        "Until we meet again. Yours in hope and anticipation, Dracula", "Best of luck to you! - Harry",
        '"All is possible." - Charles Kingsleigh', "The answer is 42", "That is 98.9°C", "See you on tour! #Rock",
        "Configuration management", "Amanda, James, John, Maria", "Whispers in the breeze\nDancing leaves\nRoots",
        "1. Chess 2. Two Truths 3. Truth or Dare",
    ],
)  # fmt: skip
def test_answers_that_end(answer: str) -> None:
    assert traits.ends(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "", "It is common. For", "First we sort the list. Then we reverse", "The capital of France is",
        "It has three parts: a head,", "```py\nx", "We walked along the river until evening came and then we saw how",
        "It is true. 这是真的。我们",
    ],
)  # fmt: skip
def test_answers_that_are_cut_off(answer: str) -> None:
    assert not traits.ends(answer)


def test_real_answers_end_and_their_halves_do_not(real: Path) -> None:
    rows = json.loads((real / "data" / "instruction" / "alpaca_roleplay.json").read_text())
    answers = [row["output"] for row in rows if traits.form(row["output"]) == "prose" and len(row["output"]) > 200]
    assert sum(traits.ends(answer) for answer in answers) >= 0.99 * len(answers)
    halves = [" ".join((words := answer.split(" "))[: len(words) // 2]) for answer in answers]
    cut = [half for half in halves if half[-1] not in ".!?:"]
    assert sum(not traits.ends(half) for half in cut) >= 0.9 * len(cut)


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        ("Plain words.", "prose"), ('{"a": [1]}', "JSON"), ("{not json}", "prose"), ("```\nx\n```", "code block"),
        ("- a\n- b\n- c", "list"), ("1. a\n2) b", "list"), ("Here:\n- one", "prose"), ("|a|b|\n|-|-|\n|1|2|", "table"),
    ],
)  # fmt: skip
def test_forms(answer: str, form: str) -> None:
    assert traits.form(answer) == form


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("What is the name of the river that is in the city?", "English"),
        ("Wie heißt der Fluss, und was ist das für eine Stadt?", "German"),
        ("Quelle est la plus belle ville que vous connaissez dans ce pays ?", "French"),
        ("¿Cómo se llama el río que está en la ciudad más grande?", "Spanish"),
        ("これは猫です。", "Japanese"), ("这是一只猫。", "Chinese"), ("이것은 고양이입니다", "Korean"),
        ("Это кошка", "Cyrillic"), ("var a = 1; var b = 2; var c = 3;", ""), ("42", ""),
    ],
)  # fmt: skip
def test_languages(text: str, language: str) -> None:
    assert traits.language(text) == language


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True), ("I cannot provide medical advice.", True),
        ("As an AI language model, I have no opinions.", True), ("Sure. As a large language model I try.", True),
        ("I'm sorry for your loss.", False), ("I can help.", False), ("She said: I cannot go.", False),
    ],
)  # fmt: skip
def test_refusals(answer: str, refuses: bool) -> None:
    assert traits.is_refusal(answer) == refuses


@pytest.mark.parametrize(("answer", "short"), [("Yes", True), ("42.", True), ("!", True), ("Yes it is", False)])
def test_short_answers(answer: str, short: bool) -> None:
    assert traits.is_short(answer) == short


def test_openings() -> None:
    assert traits.opening("**Sure!** Here's the answer, then") == "sure here's the"
    assert traits.opening("Only three words") == ""
