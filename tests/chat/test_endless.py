"""An adapter that was tuned on rows that end gives answers that end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call
from tests.training.test_run import train, write_recipe

ASKED = 50


@pytest.mark.long
@pytest.mark.parametrize(
    ("rows", "epochs", "longest", "temperature"),
    [("self_instruct_seed_tasks", 24, 250, "0.7"), ("prompt_completion_train", 10, 400, "0")],
)
def test_fifty_of_fifty_answers_stop_by_themselves(
    tmp_path: Path,
    real: Path,
    capsys: pytest.CaptureFixture[str],
    rows: str,
    epochs: int,
    longest: int,
    temperature: str,
) -> None:
    """Short answers and long ones, to questions that are held out, with room for longer ones.

    Greedily, a model of 656,000 parameters repeats itself without end where it has not learned enough: of the second
    rows 47 of 50 answers ended after 4 epochs, and all after 10; of the first, 65 tasks each of another kind, 11 after
    12 epochs and 38 after 24, while sampling had 48 and 50. Epochs and temperatures were chosen from these figures:
    this guards what was reached, and is no rate of models in general.
    """
    model = real / "models" / "tinystories-656k-llama"
    lines = (real / "data" / "instruction" / f"{rows}.jsonl").read_text(encoding="utf-8").splitlines()[-450:]
    lines = [line for line in lines if len(json.loads(line).get("prompt", line)) < 600]  # which leaves room
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:-ASKED]) + "\n", encoding="utf-8")
    (tmp_path / "asked.jsonl").write_text("\n".join(lines[-ASKED:]) + "\n", encoding="utf-8")
    recipe = write_recipe(
        tmp_path, model, adapter={"rank": 16, "alpha": 32},
        data={"train": str(tmp_path / "train.jsonl"), "valid": None, "max_tokens": 384},
        train={"epochs": epochs, "batch_size": 8, "learning_rate": 3e-3}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, tmp_path / "run") == 0
    asking = ["--adapter", str(tmp_path / "run"), "--temperature", temperature, "--seed", "1"]
    files = ["--input", str(tmp_path / "asked.jsonl"), "--output", str(tmp_path / "answers.jsonl")]
    assert call(["generate", str(model), *asking, *files, "--max-tokens", str(longest), "--batch", "16"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    print(json.dumps({"rows": rows, "tokens": sorted(answer["tokens"] for answer in answers)}))
    assert [answer["finish"] for answer in answers] == ["stop"] * ASKED
