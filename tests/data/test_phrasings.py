"""One task in several phrasings: which, for which rows, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxsft.data.formats import Conversation, Origin, conversations_of
from mlxsft.data.phrasings import BUILT_IN, Phrasings, load_phrasings
from mlxsft.errors import UsageError

HERE = Origin("rows.jsonl", 7)
BUILT = load_phrasings("instructions")


def row_of(value: object, origin: Origin = HERE) -> Conversation:
    (made,) = conversations_of(value, origin)
    assert isinstance(made, Conversation)
    return made


def question(row: Conversation) -> str:
    (user,) = [turn.content for turn in row.turns if turn.role == "user"]
    return user


def test_the_built_in_phrasings_suit_rows_with_and_without_an_input() -> None:
    assert (len(BUILT.with_input), len(BUILT.without_input)) == (10, 10)
    assert len(set(BUILT_IN["instructions"])) == 20
    assert "{instruction}" in BUILT.without_input
    assert "{instruction}\n\n{input}" in BUILT.with_input


@given(st.text(min_size=1).filter(str.strip), st.text(), st.text(min_size=1).filter(str.strip), st.integers(0, 9))
def test_every_phrasing_keeps_the_task_and_the_answer(task: str, about: str, answer: str, seed: int) -> None:
    row = row_of({"instruction": task, "input": about, "output": answer, "system": "S"})
    (phrased,) = BUILT.phrase(row, seed=seed)
    assert task.strip() in question(phrased)
    assert about.strip() in question(phrased)
    assert [t for t in phrased.turns if t.role != "user"] == [t for t in row.turns if t.role != "user"]


def test_the_phrasing_follows_from_the_seed_and_what_the_row_says() -> None:
    rows = [row_of({"prompt": f"question {i}", "completion": "A"}) for i in range(2000)]
    moved = [row_of({"question": f"question {i}", "answer": "A"}, Origin("other", i + 1)) for i in range(2000)]
    first = [question(BUILT.phrase(row, seed=0)[0]) for row in rows]
    assert first == [question(BUILT.phrase(row, seed=0)[0]) for row in moved]
    assert first != [question(BUILT.phrase(row, seed=1)[0]) for row in rows]
    used = Counter(text.replace(f"question {i}", "{instruction}") for i, text in enumerate(first))
    assert set(used) == set(BUILT.without_input)
    assert min(used.values()) > 150  # 200 of each are expected, give or take 13


@pytest.mark.parametrize(
    "value",
    [
        {"text": "T"},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"instruction": "Q", "output": "A", "history": [["P", "a"]]},
    ],
)
def test_other_rows_stay_as_they_are(value: object) -> None:
    row = row_of(value)
    assert [id(phrased) for phrased in BUILT.phrase(row, seed=0, copies=3)] == [id(row)]


def test_fields_are_filled_once_and_braces_in_rows_are_text() -> None:
    phrasings = Phrasings(("<{input}|{instruction}>",), ("<{prompt}>",))
    assert question(phrasings.phrase(row_of({"prompt": "{input} {}", "completion": "A"}), seed=0)[0]) == "<{input} {}>"
    row = row_of({"instruction": "{input}", "input": "{x}", "output": "A"})
    assert question(phrasings.phrase(row, seed=0)[0]) == "<{x}|{input}>"
    assert Phrasings((), ("x {instruction}",)).phrase(row, seed=0)[0] is row


def test_the_copies_of_a_row_are_phrased_each_in_another_way() -> None:
    row = row_of({"prompt": "Why?", "completion": "A"})
    for seed in range(20):
        copies = [question(phrased) for phrased in BUILT.phrase(row, seed=seed, copies=4)]
        assert len(set(copies)) == 4
        assert copies[:1] == [question(phrased) for phrased in BUILT.phrase(row, seed=seed)]
    every = [question(phrased) for phrased in BUILT.phrase(row, seed=0, copies=100)]
    assert sorted(every) == sorted(text.replace("{instruction}", "Why?") for text in BUILT.without_input)


@pytest.mark.parametrize("name", ["mine.yaml", "mine.yml", "mine.json"])
def test_a_file_of_phrasings(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps({"phrasings": ["Do: {instruction}", "{input}: {instruction}", "{prompt}"]}))
    assert load_phrasings(str(path)) == Phrasings(
        ("{input}: {instruction}", "{prompt}"), ("Do: {instruction}", "{prompt}")
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("phrasings: ['{instruction}', 'Do {it}']", "mine.yaml:1: phrasings[1]: no such field: {it}"),
        ("phrasings:\n- '{input}'", "mine.yaml:2: phrasings[0]: neither {instruction} nor {prompt} is in it"),
        ("phrasings:\n- '{prompt} {input}'", "phrasings[0]: {prompt} is instruction and input together"),
        ("phrasings: [3]", "phrasings[0]: got 3, expected text"),
        ("phrasings: []", "phrasings: expected a list of texts"),
        ("", "phrasings: expected a list of texts"),
        ("phrasings: ['{prompt}']\nmore: 1", "mine.yaml:2: more: no such setting"),
        ("[", "not YAML"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(UsageError) as refused:
        load_phrasings(str(tmp_path / "mine.yaml"))
    assert message in refused.value.message


def test_an_unknown_name_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='got "flan"') as refused:
        load_phrasings("flan")
    assert refused.value.hint == "Built in: instructions; anything else is a .yaml file."
    with pytest.raises(UsageError, match="no such file"):
        load_phrasings(str(tmp_path / "absent.yaml"))
