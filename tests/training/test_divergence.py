"""A run whose numbers run away goes back to its last good state, once and at half the rate; then it stops there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsft.cli import call
from mlxsft.recipe_training import TrainRecipe
from mlxsft.training.schedule import loss_limit
from tests.tiny import write_llama
from tests.training.test_run import events, same_adapter, write_recipe


def all_saved_is_finite(run: Path) -> bool:
    return all(np.isfinite(t).all() for file in run.rglob("*.safetensors") for t in load_file(file).values())


def test_three_steps_that_are_not_finite_roll_back_once_and_then_end_the_run(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__learning_rate=1e30, train__warmup=0, train__steps=40)
    run = tmp_path / "run"
    assert call(["train", str(recipe), "--out", str(run)]) == 5
    told = [(e["event"], e["step"]) for e in events(run) if e["event"] in ("step", "rolled_back")]
    steps = [("step", step) for step in (1, 2, 3, 4)]
    assert told == [*steps, ("rolled_back", 4), *steps]
    assert [s["skipped"] for s in events(run, "step")] == [False, True, True, True] * 2
    assert [s["learning_rate"] for s in events(run, "step")][::4] == [1e30, 0.5e30]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-0000000"]  # the bad one of step 2 is gone
    assert not (run / "adapters.safetensors").exists()
    assert all_saved_is_finite(run)
    assert "--allow-change learning_rate" in capsys.readouterr().err

    lower = ["--resume", "--set", "train.learning_rate=0.01", "--allow-change", "learning_rate"]
    assert call(["train", str(recipe), "--out", str(run), *lower]) == 0
    assert events(run, "step")[-1]["step"] == 40
    assert {s["learning_rate"] for s in events(run, "step")} <= {s["learning_rate"] for s in events(run, "step")}
    assert events(run, "step")[0]["learning_rate"] == 0.01  # the rate that was asked for, not half of it


def test_a_loss_over_the_limit_rolls_back_and_the_second_one_leaves_the_last_good_state(
    tmp_path: Path, tiny_llama: Path
) -> None:
    """The rate rises until the model explodes: the steps before are good."""
    rise = {"train__learning_rate": 1000.0, "train__warmup": 60, "train__steps": 60, "train__loss_limit": 12.0}
    recipe = write_recipe(tmp_path, tiny_llama, save__every=1, adapter__dropout=0.0, **rise)
    run = tmp_path / "run"
    assert call(["train", str(recipe), "--out", str(run)]) == 5
    (back,) = events(run, "rolled_back")
    steps = events(run, "step")
    first = next(i for i, s in enumerate(steps) if s["loss"] is None or s["loss"] > 12)
    assert back["to_step"] == steps[first]["step"] - 2  # the state before gave the loss
    assert back["rate_factor"] == 0.5
    assert steps[first + 1]["step"] == back["to_step"] + 1
    assert all(s["loss"] is None or s["loss"] <= 12 for s in steps[first + 1 : -1])
    assert steps[-1]["loss"] > 12
    newest = max((run / "checkpoints").iterdir())
    assert newest.name == f"step-{steps[-1]['step'] - 2:07d}"
    assert (newest / "adapters.safetensors").exists()
    saved = load_file(newest / "adapters.safetensors")
    assert all(np.array_equal(t, saved[name]) for name, t in load_file(run / "adapters.safetensors").items())
    assert all_saved_is_finite(run)


def test_a_run_that_rolled_back_and_was_stopped_ends_as_if_never_stopped(tmp_path: Path, tiny_llama: Path) -> None:
    """Stopped right before the loss runs away, behind the roll-back, and in between: the adapter is the same."""
    changes = {"train__learning_rate": 30.0, "train__warmup": 0, "train__schedule": "linear", "train__steps": 12}
    recipe = write_recipe(tmp_path, tiny_llama, save__every=3, train__loss_limit=7.0, **changes)
    straight = tmp_path / "straight"
    code = call(["train", str(recipe), "--out", str(straight)])
    assert len(events(straight, "rolled_back")) == 1, code
