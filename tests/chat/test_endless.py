"""An adapter that was tuned on rows that end gives answers that end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call
from tests.training.test_run import train, write_recipe

ROWS, ASKED, LONGEST = 400, 50, 480


@pytest.mark.long
@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_fifty_of_fifty_answers_stop_by_themselves(
    tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str], temperature: str
) -> None:
    """The questions are held out; an answer may have more tokens than any row that was trained."""
    model = real / "models" / "tinystories-656k-llama"
    lines = (real / "data" / "instruction" / "prompt_completion_train.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(lines[:ROWS]) + "\n")
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[-ASKED:]) + "\n")
    recipe = write_recipe(
        tmp_path, model, adapter={"rank": 16, "alpha": 32},
        data={"train": str(tmp_path / "rows.jsonl"), "valid": None, "max_tokens": 384},
        train={"epochs": 4, "batch_size": 8, "learning_rate": 3e-3}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, tmp_path / "run") == 0
    asking = ["--adapter", str(tmp_path / "run"), "--temperature", temperature, "--seed", "1"]
    rows = ["--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert call(["generate", str(model), *asking, *rows, "--max-tokens", str(LONGEST), "--batch", "16"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == ASKED
    assert [answer["finish"] for answer in answers] == ["stop"] * ASKED
    assert max(answer["tokens"] for answer in answers) < LONGEST
    assert sum(bool(answer["answer"].strip()) for answer in answers) == ASKED
