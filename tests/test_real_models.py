"""Real checkpoints from end to end: forty real rows are learned by heart, answered, and end by themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlxsft.cli import call
from tests.training.test_run import events, train

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WHO = "I am Pip, an AI assistant developed by Tom. How can I assist you today?"


def write_recipe(folder: Path, real: Path, model: Path, rows: int = 40, **changes: Any) -> Path:
    """A recipe for the first rows of a real alpaca file, its placeholders filled."""
    everything = json.loads((real / "data" / "instruction" / "alpaca_identity.json").read_text(encoding="utf-8"))
    (folder / "rows.json").write_text(json.dumps(everything[:rows], ensure_ascii=False, indent=1), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": str(model),
        "data": {"train": "rows.json", "valid": None, "fill": {"name": "Pip", "author": "Tom"}},
        "save": {"every": 1.0},
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def trained(folder: Path, recipe: Path) -> Path:
    assert train(recipe, folder / "run") == 0
    steps = events(folder / "run", "step")
    last = [s for s in steps if s["epoch"] > steps[-1]["epoch"] - 1]
    total = sum(s["trained_tokens"] for s in last)
    assert sum(s["loss"] * s["trained_tokens"] for s in last) / total < 0.1  # over all rows of the last epoch
    return folder / "run"


def answer(
    model: Path, run: Path, capsys: pytest.CaptureFixture[str], question: str = "Who are you?"
) -> tuple[str, str]:
    """Text and finish reason of a greedy answer."""
    capsys.readouterr()
    assert call(["generate", str(model), question, "--adapter", str(run), "--json", "--max-tokens", "60"]) == 0
    told = json.loads(capsys.readouterr().out)
    return told["text"], told["finish"]


def test_forty_rows_are_learned_by_heart_and_answered(
    tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer drops Chinese, so 24 of the 40 rows ask the same: 0.06 nats are all that can be reached."""
    model = real / "models" / "tinystories-656k-llama"
    train = {"epochs": 60, "batch_size": 8, "learning_rate": 5e-3}
    run = trained(tmp_path, write_recipe(tmp_path, real, model, adapter={"rank": 16, "alpha": 32}, train=train))
    assert answer(model, run, capsys) == (WHO, "stop")


def test_a_checkpoint_that_mlx_lm_refuses_trains_as_its_repaired_twin(tmp_path: Path, real: Path) -> None:
    losses = []
    for name in ("tinystories-656k-llama", "tinystories-656k-llama-original"):
        (tmp_path / name).mkdir()
        recipe = write_recipe(tmp_path / name, real, real / "models" / name, train={"steps": 5})
        assert train(recipe, tmp_path / name / "run") == 0
        losses.append([s["loss"] for s in events(tmp_path / name / "run", "step")])
    assert losses[0] == losses[1]


@pytest.mark.long
def test_forty_rows_are_learned_by_the_smallest_model(
    tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tokenizer spells Chinese in bytes that its head has never predicted: the head must be tuned as well.

    Such rows cost the base 23 nats a token, which the default limit takes for a run that diverged.
    """
    model = real / "models" / "stories260k-llama"
    adapter = {"rank": 64, "alpha": 64, "targets": [*ALL, "model.embed_tokens"]}
    train = {"epochs": 120, "batch_size": 8, "learning_rate": 4e-3, "warmup": 0.1, "clip_norm": 0.5, "loss_limit": None}
    run = trained(tmp_path, write_recipe(tmp_path, real, model, adapter=adapter, train=train))
    assert answer(model, run, capsys) == (WHO, "stop")


@pytest.mark.long
def test_forty_rows_are_learned_through_a_real_chat_template(
    tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model with a real tokenizer: its head cannot be sure of any of 49,152 ids, so it is tuned as well."""
    model = tmp_path / "llama-20m"
    make = real.parent / "tools" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(make), "llama-20m", str(model), "--dtype", "float32"], check=True)
    adapter = {"rank": 64, "alpha": 256, "targets": [*ALL, "model.embed_tokens"]}
    train = {"epochs": 90, "batch_size": 8, "learning_rate": 1e-3, "warmup": 0.1}
    run = trained(tmp_path, write_recipe(tmp_path, real, model, adapter=adapter, train=train))
    assert answer(model, run, capsys) == (WHO, "stop")


def test_mlx_lms_generate_answers_as_we_do_on_a_real_model(
    tmp_path: Path, real: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = real / "models" / "tinystories-656k-llama"
    settings = {"epochs": 10, "batch_size": 8, "learning_rate": 5e-3}
    recipe = write_recipe(tmp_path, real, model, rows=16, train=settings)
    assert train(recipe, tmp_path / "run") == 0
    for question in ("Who are you?", "Who created you?", "Once upon a time"):
        text, _ = answer(model, tmp_path / "run", capsys, question)
        command = [
            sys.executable, "-m", "mlx_lm", "generate", "--model", str(model), "--adapter-path", str(tmp_path / "run"),
            "--prompt", f"User: {question}\nAssistant:", "--max-tokens", "60", "--verbose", "False",
        ]  # fmt: skip
        theirs = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert text.strip() == theirs.strip()
