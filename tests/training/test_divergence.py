"""A run whose numbers run away goes back to its last good state, once and at half the rate; then it stops there."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlxsft.recipe import load_recipe
from mlxsft.recipe_training import TrainRecipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.run import run_training
from mlxsft.training.schedule import loss_limit
from tests.training.test_run import events, same_adapter, train, write_recipe, write_rows

OVERFLOW = {
    "train__learning_rate": 1.25e18, "train__schedule": "constant", "train__warmup": 0, "train__steps": 12,
    "save__every": 100,
}  # fmt: skip


def all_saved_is_finite(run: Path) -> bool:
    return all(np.isfinite(t).all() for file in run.rglob("*.safetensors") for t in load_file(file).values())


def test_three_steps_that_are_not_finite_roll_back_once_and_then_end_the_run(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__learning_rate=1e30, train__warmup=0, train__steps=40)
    run = tmp_path / "run"
    assert train(recipe, run) == 5
    told = [(e["event"], e["step"]) for e in events(run) if e["event"] in ("step", "rolled_back")]
    steps = [("step", step) for step in (1, 2, 3, 4)]
    assert told == [*steps, ("rolled_back", 4), *steps]
    assert [s["skipped"] for s in events(run, "step")] == [False, True, True, True] * 2
    assert [s["learning_rate"] for s in events(run, "step")][::4] == [1e30, 0.5e30]
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-0000000"]  # the bad one of step 2 is gone
    assert not (run / "adapters.safetensors").exists()
    assert all_saved_is_finite(run)
    assert "--allow-change learning_rate" in capsys.readouterr().err

    assert train(recipe, run, "train.learning_rate=0.01", resume=True, allow_changes=["learning_rate"]) == 0
    assert events(run, "step")[-1]["step"] == 40
    assert events(run, "step")[0]["learning_rate"] == 0.01  # the rate that was asked for, not half of it


def test_a_run_that_goes_back_can_end_well(tmp_path: Path, tiny_llama: Path) -> None:
    """At this rate the squares of the activations overflow after some steps, at half of it they do not."""
    run = tmp_path / "run"
    assert train(write_recipe(tmp_path, tiny_llama, **OVERFLOW), run) == 0
    (back,) = events(run, "rolled_back")
    assert back["to_step"] == 0
    assert "not finite 3 times in a row" in back["reason"]
    rates = [s["learning_rate"] for s in events(run, "step")]
    assert rates == [1.25e18] * back["step"] + [1.25e18 / 2] * 12
    assert events(run, "end")[0]["step"] == 12
    assert all_saved_is_finite(run)


@pytest.mark.parametrize("judged", [{}, {"data__valid": 0.3, "eval__every": 2}])
@pytest.mark.parametrize("stops", [[3], [4, 9], [8, 11], [7, 10, 14, 17]])
def test_a_run_that_goes_back_and_is_stopped_on_the_way_ends_with_the_same_bits(
    tmp_path: Path, tiny_llama: Path, stops: list[int], judged: dict[str, float]
) -> None:
    """Also where the stop, or the best evaluation, saved a state between the planned ones, nearer to the divergence."""
    recipe = write_recipe(tmp_path, tiny_llama, **OVERFLOW, **judged)
    assert train(recipe, tmp_path / "straight") == 0
    run, made = tmp_path / "run", 0
    for stop in [*stops, 100]:
        begun = run.exists()
        for event in run_training(
            load_recipe(recipe),
            RunFolder(run),
            backend_name="mlx",
            resume=begun,
            force=False,
            stop=lambda: made >= stop,  # noqa: B023  # called in this turn of the loop only
            tell=print,
        ):
            made += event.kind == "step"
    assert same_adapter(run, tmp_path / "straight")
    assert len(events(run, "rolled_back")) == 1
    told = [
        [(s["step"], s["loss"], s["learning_rate"]) for s in events(r, "step")] for r in (run, tmp_path / "straight")
    ]
    assert told[0] == told[1]


def odd_one_out(folder: Path, model: Path) -> Path:
    """A recipe with seven rows that are soon learned and one that is not, one row a step."""
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 4  # so that it learns fast
    loud = folder / "loud"
    shutil.copytree(model, loud)
    save_file(tensors, loud / "model.safetensors", metadata={"format": "pt"})
    recipe = write_recipe(
        folder, loud, train__batch_size=1, train__steps=16, train__learning_rate=0.02, train__schedule="constant",
        train__warmup=0, adapter__dropout=0.0, save__every=1, train__loss_limit=None,
    )  # fmt: skip
    write_rows(folder / "rows.jsonl", [("hello", "Hello!")] * 7 + [("Who?", "qzx jv 7 wk ~ 9 %")])
    return recipe


def test_a_loss_over_the_limit_goes_back_to_the_state_before_and_the_second_one_leaves_that_state(
    tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = odd_one_out(tmp_path, tiny_llama)
    assert train(recipe, tmp_path / "straight") == 0
    losses = {s["step"]: s["loss"] for s in events(tmp_path / "straight", "step")}
    odd = max(range(9, 17), key=losses.__getitem__)  # in the second epoch
    limit = (losses[odd] + max(losses[s] for s in range(9, 17) if s != odd)) / 2

    run = tmp_path / "run"
    assert train(recipe, run, "train.steps=8") == 0
    allowed = ["loss_limit", "steps"]
    assert train(recipe, run, f"train.loss_limit={limit}", resume=True, allow_changes=allowed) == 5
    (back,) = events(run, "rolled_back")
    assert (back["step"], back["to_step"]) == (odd, odd - 2)  # the state of the step before gave the loss
    assert events(run, "step")[-1]["step"] == odd
    assert sorted(p.name for p in (run / "checkpoints").iterdir())[-1] == f"step-{odd - 2:07d}"
    newest = load_file(run / "checkpoints" / f"step-{odd - 2:07d}" / "adapters.safetensors")
    assert all(np.array_equal(t, newest[name]) for name, t in load_file(run / "adapters.safetensors").items())


def test_a_base_whose_weights_overflow_ends_the_run_before_it_is_trained(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tensors = load_file(base / "model.safetensors")
    save_file({name: t * np.float32(1e20) for name, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    assert train(write_recipe(tmp_path, base), run) == 5
    assert [s["skipped"] for s in events(run, "step")] == [True] * 3
    assert not events(run, "rolled_back")  # half the rate would change nothing
    assert "before it is trained" in capsys.readouterr().err
    assert all_saved_is_finite(run)


def test_the_limit_of_the_loss_is_three_times_the_first_or_twenty_nats_or_what_is_asked_for() -> None:
    assert loss_limit(TrainRecipe(), 2.0) == 20.0
    assert loss_limit(TrainRecipe(), 9.0) == 27.0
    assert loss_limit(TrainRecipe(), None) is None
    assert loss_limit(TrainRecipe(loss_limit=None), 2.0) is None
    assert loss_limit(TrainRecipe(loss_limit=5.0), 2.0) == 5.0
