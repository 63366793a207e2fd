"""`data check`: every row is accounted for, and what is found is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlxsft.data.audit import Audit, check
from mlxsft.data.audit_page import page
from mlxsft.data.render import Renderer, load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe

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
