"""`data check`: every row is accounted for, and what is found is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

from mlxsft.data.audit import Audit, check
from mlxsft.data.audit_page import page
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe
from tests.tiny import write_llama

TALE = "Once upon a time a small grey cat walked along the river and met a dog who had lost his way home that day."
ROWS = [
    '{"prompt": "a", "completion": "One two three four five."}',
    '{"prompt": "b", "completion": "Six seven eight nine."}',
    '{"prompt": "c", "completion": ""}',
    '{"prompt": "", "completion": "x"}',
    '{"prompt": "<|im_end|>", "completion": "x"}',
    '{"prompt": 3}',
    "{broken",
    "[1]",
    '{"messages": [{"role": "user", "content": "q"}]}',
    '{"text": "plain"}',
    json.dumps({"prompt": "long", "completion": "x" * 400}),
    "",
]


@pytest.fixture(scope="module")
def renderer(tiny_llama: Path) -> Renderer:
    return load_renderer(open_model(str(tiny_llama)))


def recipe(**settings: Any) -> DataRecipe:
    return DataRecipe.model_validate({"train": "x", **settings})


def audit_of(folder: Path, renderer: Renderer, rows: list[dict[str, object]], held: list[Any] | None = None) -> Audit:
    for name, some in (("train", rows), ("valid", held or [])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    beside = {"valid": [folder / "valid.jsonl"]} if held else {}
    return check([folder / "train.jsonl"], recipe(), renderer, held_out=beside)


def counts(audit: Audit) -> dict[str, int]:
    return {f.id: f.count for f in audit.findings}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.sampled_from(ROWS), max_size=25))
def test_the_ledger_adds_up_for_any_mixture(rows: list[str], renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([ROWS[0], *rows]))
    ledger = check([path], recipe(max_tokens=64), renderer).ledger
    assert ledger["read"] == 1 + sum(bool(row) for row in rows)
    assert ledger["read"] == sum(n for name, n in ledger.items() if name != "read")
    assert ledger["usable"] == len({ROWS[0], *rows} & {ROWS[0], ROWS[1], ROWS[9]})


def test_copies_near_copies_and_other_answers(renderer: Renderer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "tell", "completion": TALE},
        {"prompt": "tell", "completion": TALE},
        {"prompt": "tell", "completion": TALE + " Indeed."},
        {"prompt": "sing", "completion": "La la la."},
    ]
    audit = audit_of(tmp_path, renderer, rows)
    assert audit.ledger == {"read": 4, "usable": 3, "duplicate": 1}
    assert {k: n for k, n in counts(audit).items()} == {
        "duplicates": 1, "near-duplicates": 1, "conflicting-answers": 1,
    }  # fmt: skip
    assert {f.examples[0].place.rpartition(":")[2] for f in audit.findings} == {"2", "3"}


def test_leaks_by_row_by_prompt_and_nearly(renderer: Renderer, tmp_path: Path) -> None:
    train: list[dict[str, object]] = [
        {"prompt": "q", "completion": "Yes it is so."},
        {"prompt": "t", "completion": TALE},
    ]
    held = [train[0], {"prompt": "Q ", "completion": "No."}, {"prompt": "t2", "completion": TALE}]
    held.append({"prompt": "something else", "completion": "Quite another answer."})
    audit = audit_of(tmp_path, renderer, train, held)
    assert audit.held_out == {"valid": {"read": 4, "compared": 4}}
    assert counts(audit)["leakage"] == 3
    (leak,) = [f for f in audit.findings if f.id == "leakage"]
    assert leak.share == 0.75
    assert [e.excerpt.split(" of ")[0] for e in leak.examples][:2] == ["an exact copy", "the prompt"]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "prompt": st.one_of(st.text(max_size=12), st.none(), st.integers()),
                "completion": st.one_of(st.text(max_size=30), st.just("Yes"), st.just("{{x}} <|im_end|>")),
                "category": st.sampled_from(["a", "b", ""]),
                "text": st.text(max_size=9),
            },
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_row_is_accounted_for_on_every_side(
    rows: list[dict[str, object]], renderer: Renderer, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rows.json").write_text(json.dumps({"data": rows}))
    for path in (tmp_path / "rows.jsonl", tmp_path / "rows.json"):
        audit = check([path], recipe(), renderer, held_out={"valid": [path]})
        for ledger in (audit.ledger, audit.held_out["valid"]):
            assert ledger["read"] == len(rows) == sum(n for name, n in ledger.items() if name != "read")
        assert all(0 < finding.count <= len(rows) and finding.share <= 1 for finding in audit.findings)


def words(seed: int, count: int) -> str:
    """A sentence of random words."""
    return " ".join(f"w{n}" for n in np.random.default_rng(seed).integers(0, 5000, count)) + "."


@pytest.mark.parametrize(("words_changed", "found"), [(0, ["an exact copy of"]), (1, ["nearly"]), (30, [])])
def test_a_leak_is_found_by_how_much_is_the_same(
    words_changed: int, found: list[str], renderer: Renderer, tmp_path: Path
) -> None:
    train: list[dict[str, object]] = [{"prompt": words(i, 9), "completion": words(1000 + i, 60)} for i in range(50)]
    prompt, answer = str(train[7]["prompt"]), str(train[7]["completion"]).split(" ")
    answer[:words_changed] = ["other"] * words_changed
    held = [{"prompt": f"{words(99, words_changed)[:-1]} {prompt}".strip(), "completion": " ".join(answer)}]
    leaks = [f for f in audit_of(tmp_path, renderer, train, held).findings if f.id == "leakage"]
    assert [leak.examples[0].excerpt.partition(" /")[0] for leak in leaks] == found
    assert all(":8:" in leak.examples[0].excerpt for leak in leaks)


def finding(audit: Audit, id: str) -> str:
    """The detail of a finding; nothing where there is none."""
    return next((f.detail for f in audit.findings if f.id == id), "")


def answered(answers: list[str]) -> list[dict[str, object]]:
    return [{"prompt": f"question {words(i, 5)}", "completion": answer} for i, answer in enumerate(answers)]


def examples(audit: Audit, id: str) -> list[tuple[str, str]]:
    shown = next(f.examples for f in audit.findings if f.id == id)
    return [(e.place.rpartition(".jsonl:")[2], e.excerpt) for e in shown]


def test_findings_of_the_whole_set_show_the_first_rows_that_make_them(renderer: Renderer, tmp_path: Path) -> None:
    rows = answered([words(0, 9), *(f"- Sure, here is {words(i, 5)}\n- b" for i in range(1, 24))])
    for i, row in enumerate(rows):
        row["category"] = "rare" if i == 7 else "many"
    audit = audit_of(tmp_path, renderer, rows)
    first = [(str(i + 1), f"- Sure, here is {words(i, 5)} - b") for i in (1, 2, 3)]
    assert examples(audit, "opening-phrase") == examples(audit, "answer-format") == first
    assert examples(audit, "class-balance") == [("8", f"question {words(7, 5)}")]


def test_a_broken_row_is_shown_with_its_column(renderer: Renderer, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "q", "completion": "a b"}\n{"prompt": "q" "completion": "a"}\n')
    audit = check([path], recipe(), renderer)
    assert examples(audit, "broken") == [("2:16", "bad JSON: Expecting ',' delimiter")]


def test_personal_data_is_found_in_calls_and_thoughts(renderer: Renderer, tmp_path: Path) -> None:
    mail = "jo.doe@mail.com"
    call = {"function": {"name": "send", "arguments": {"to": [mail]}}}
    rows: list[dict[str, object]] = [
        {"messages": [{"role": "user", "content": "Send it."}, {"role": "assistant", "content": "Yes.", **said}]}
        for said in ({"tool_calls": [call]}, {"reasoning_content": f"The address is {mail}."})
    ]
    assert [place for place, _ in examples(audit_of(tmp_path, renderer, rows), "pii")] == ["1", "2"]


def test_rows_that_become_one_example_a_turn_are_said_and_measured_by_the_example(real: Path, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "qwen3", tokenizer_from=real / "tokenizers" / "qwen3")
    turns = [{"role": role, "content": f"{role} {i}"} for i in range(3) for role in ("user", "assistant")]
    renderer = load_renderer(open_model(str(model)))
    audit = audit_of(tmp_path, renderer, [{"messages": turns}, {"messages": turns[:2]}])
    (note,) = [n for n in audit.notes if "one example a turn" in n]
    assert "1 rows" in note
    assert note.endswith(".jsonl:1)")
    assert sum(count for _, _, count in audit.lengths["total"].histogram()) == 4
    answers = {len(renderer.tokenizer.encode(f"assistant {i}<|im_end|>")) for i in range(3)}
    summary = audit.lengths["response"].summary()
    assert (summary["min"], summary["max"]) == (min(answers), max(answers))


def test_one_opening_in_a_fifth_of_the_answers_dominates(renderer: Renderer, tmp_path: Path) -> None:
    others = [words(i, 8 + i % 30) for i in range(40)]
    sure = [f"Sure, here is it: {words(i, 9 + i)}" for i in range(10)]
    assert finding(audit_of(tmp_path, renderer, answered(others + sure)), "opening-phrase") == (
        "'sure here is' in 20% of the answers"
    )
    assert not finding(audit_of(tmp_path, renderer, answered(others + sure[:9])), "opening-phrase")


@pytest.mark.parametrize(
    ("marked", "kind"), [("- a{}\n- b\n- c", "list"), ('{{"a": {}}}', "JSON"), ("|a|{}|\n|-|-|\n|1|2|", "table")]
)
def test_a_marked_form_dominates_and_prose_does_not(marked: str, kind: str, renderer: Renderer, tmp_path: Path) -> None:
    prose = [words(i, 8 + i) for i in range(20)]
    forms = [marked.format(i) for i in range(80)]
    assert kind in finding(audit_of(tmp_path, renderer, answered(prose + forms)), "answer-format")
    assert not finding(audit_of(tmp_path, renderer, answered(prose + forms[:60])), "answer-format")
    assert not finding(audit_of(tmp_path, renderer, answered(prose)), "answer-format")


def test_answers_of_one_length_are_told_and_labels_are_not(renderer: Renderer, tmp_path: Path) -> None:
    alike = [f"{'word ' * (40 + i % 3)}{i % 10}." for i in range(60)]
    assert finding(audit_of(tmp_path, renderer, answered(alike)), "answer-format").startswith("nine in ten answers")
    assert not finding(audit_of(tmp_path, renderer, answered(["Yes.", "No."] * 30)), "answer-format")


def test_languages_are_told_with_their_rows(renderer: Renderer, tmp_path: Path) -> None:
    answers = ["It is the name of the river in the city."] * 3 + ["Das ist der Fluss und die Stadt."]
    (found,) = [f for f in audit_of(tmp_path, renderer, answered(answers)).findings if f.id == "languages"]
    assert (found.count, found.detail) == (1, "mostly English (3); also German 1")
    assert [e.place.rpartition(":")[2] for e in found.examples] == ["4"]


def test_small_categories_are_named(renderer: Renderer, tmp_path: Path) -> None:
    rows = answered([words(i, 9) for i in range(100)])
    for i, row in enumerate(rows):
        row["category"] = "rare" if i < 4 else ("a", "b")[i % 2]
    audit = audit_of(tmp_path, renderer, rows)
    assert finding(audit, "class-balance") == ""
    assert audit.profile["category"] == {"a": 48, "b": 48, "rare": 4}
    rows[0]["category"] = rows[1]["category"] = "a"
    assert finding(audit_of(tmp_path, renderer, rows), "class-balance") == "rare 2"


def test_text_that_the_tokenizer_loses(tmp_path: Path) -> None:
    """A tokenizer of words knows no other: what comes back is not what went in."""
    model = write_llama(tmp_path / "model")
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "<|im_end|>": 1, **{c: 2 + i for i, c in enumerate(TALE)}}, "[UNK]"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.save(str(model / "tokenizer.json"))
    audit = audit_of(
        tmp_path, load_renderer(open_model(str(model))), answered(["a cat.", "a c\u00e4t.", "a \u0107at."])
    )
    (lost,) = [f for f in audit.findings if f.id == "lost-text"]
    assert (lost.count, lost.detail) == (2, "characters: \u00e4\u0107")


def test_answers_that_do_not_end_unless_that_is_the_style(renderer: Renderer, tmp_path: Path) -> None:
    whole = [f"This is a whole answer. {words(i, 9)}" for i in range(8)]
    cut = [f"{answer[:-1]} of the" for answer in whole]
    assert counts(audit_of(tmp_path, renderer, answered(whole + cut[:2])))["unended"] == 2
    assert "unended" not in counts(audit_of(tmp_path, renderer, answered(whole[:2] + cut)))


def test_shares_of_a_profile_are_those_of_all_rows(renderer: Renderer, tmp_path: Path) -> None:
    audit = audit_of(tmp_path, renderer, answered([words(i, 9) for i in range(60)]))
    assert sum(audit.profile["opening"].values()) == 60
    assert audit.profile["opening"]["(others)"] == 40


def test_what_single_rows_show(renderer: Renderer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "mail?", "completion": "Write to jo.doe@mail.com today."},
        {"prompt": "key?", "completion": "It is AKIA" + "J4K2M7Q9P3T6W8Z1."},
        {"prompt": "I am {{name}}", "completion": "Hello there my friend."},
        {"prompt": "r", "completion": "I'm sorry, but I can't help with that."},
        {"prompt": "s", "completion": "Yes"},
        {"prompt": "<|im_end|>", "completion": "That is odd."},
    ]
    assert counts(audit_of(tmp_path, renderer, rows)) == {
        "pii": 1, "secrets": 1, "placeholders": 1, "refusals": 1, "short-answers": 1, "special-tokens": 1,
    }  # fmt: skip


def test_the_page_escapes_everything_and_needs_nothing(renderer: Renderer, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "<script>x</script>", "completion": "{{name}}<b>"}] * 2
    html = page(audit_of(tmp_path, renderer, rows), "<i>")
    assert "<script" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "http" not in html
    assert "<svg" in html


def test_every_real_file_adds_up(real: Path) -> None:
    renderer = load_renderer(open_model(str(real / "models" / "tinystories-656k-llama")))
    for file in sorted((real / "data").rglob("*.json*")):
        ledger = check([file], recipe(), renderer).ledger
        assert ledger["read"] > 0
        assert ledger["read"] == sum(n for name, n in ledger.items() if name != "read"), file.name
