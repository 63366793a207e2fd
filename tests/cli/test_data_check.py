"""`mlxsft data check` as scripts use it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call


def test_gate_page_and_json(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "Who are you?", "completion": "I am jo@mail.com."}\n')
    page = tmp_path / "page.html"
    common = ["data", "check", str(rows), "--model", str(tiny_llama)]
    assert call([*common, "--json", "--html", str(page), "--fail-on", "leakage,pii"]) == 6
    made = json.loads(capsys.readouterr().out)
    assert made["ledger"] == {"read": 1, "usable": 1}
    assert page.read_text().startswith("<!doctype html>")
    assert call([*common, "--html", str(page)]) == 2
    assert call([*common, "--fail-on", "leakage"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert call([*common, "--fail-on", "nonsense"]) == 2


def test_the_settings_of_a_recipe(tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every setting that decides what becomes of a row decides it here as in a run."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"Frage, kurz": "Who are you?", "Antwort": "I am Pip."},
        {"Frage, kurz": "Who " * 200, "Antwort": "I am Tom."},
        {"Frage, kurz": "<|im_end|>", "Antwort": "I am Tom, an assistant."},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def ledger(*options: str) -> dict[str, int]:
        common = ("data", "check", str(path), "--model", str(tiny_llama), "--json", "--max-tokens", "64")
        assert call([*common, "--columns", "prompt=Frage, kurz,response=Antwort", *options]) == 0
        made: dict[str, int] = json.loads(capsys.readouterr().out)["ledger"]
        return made

    assert ledger() == {"read": 3, "usable": 2, "special token": 1}
    assert ledger("--special-tokens", "escape") == {"read": 3, "usable": 3}
    assert ledger("--too-long", "drop") == {"read": 3, "usable": 1, "special token": 1, "too long": 1}
    assert ledger("--max-tokens", "2000", "--special-tokens", "allow", "--train-on", "all") == {"read": 3, "usable": 3}
    assert ledger("--format", "text") == {"read": 3, "usable": 0, "unknown format": 3}


def test_columns_are_named_in_one_option_or_in_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('F,"A, B"\nq,a\n')
    out = tmp_path / "out.jsonl"
    common = ["data", "convert", str(path), "--out", str(out), "--force", "--json"]
    for columns in (["--columns", "prompt=F,response=A, B"], ["--columns", "prompt=F", "--columns", "response=A, B"]):
        assert call([*common, *columns]) == 0
        assert json.loads(capsys.readouterr().out)["ledger"] == {"read": 1, "written": 1}
    assert call(["data", "split", str(path), "--out", str(tmp_path), "--columns", "prompt=F,response=A, B"]) == 0
    for wrong, words in (("Frage=F", "names: prompt, response, "), ("prompt", "expected NAME=VALUE")):
        assert call([*common, "--columns", wrong]) == 2
        assert words in capsys.readouterr().err
