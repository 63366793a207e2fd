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
    assert call([*common, "--html", str(page)]) == 3
    assert call([*common, "--fail-on", "leakage"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert call([*common, "--fail-on", "nonsense"]) == 2
