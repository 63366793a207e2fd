"""A forecast beside the run that it is of; changes that make a run fit; a Mac on paper."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call
from mlxsft.errors import UsageError
from mlxsft.recipe import load_recipe
from mlxsft.training.plan import TERAFLOPS, Forecast, changes_for, fitting, forecast, on_paper, with_settings
from mlxsft.training.trial import Trial
from tests.tiny import write_llama
from tests.training.test_run import events, write_recipe

MEMORY_TOLERANCE = 0.15


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


@pytest.fixture(scope="module")
def recipe(place: Path) -> Path:
    """Of a model whose activations take more than its weights."""
    model = write_llama(place, layers=4)
    changes = {"train__micro_batch_tokens": 512, "train__epochs": 4, "train__steps": None, "data__valid": 0.2}
    return write_recipe(place, model, **changes)


@pytest.fixture(scope="module")
def planned(recipe: Path) -> Trial:
    return forecast(load_recipe(recipe), "mlx").trial


def test_the_run_is_as_it_was_told(recipe: Path, planned: Trial, tmp_path: Path) -> None:
    assert call(["train", str(recipe), "--out", str(tmp_path / "run"), "--backend", "mlx"]) == 0  # in its own process
    steps, start = events(tmp_path / "run", "step"), events(tmp_path / "run", "start")[0]
    end = events(tmp_path / "run", "end")[0]
    assert planned.steps == len(steps)
    assert planned.trainable_parameters == start["trainable_parameters"]
    assert planned.parameters == start["parameters"]
    assert planned.epochs * planned.trained_tokens == pytest.approx(end["trained_tokens"], rel=0.1)
    first_epoch = [step for step in steps if step["epoch"] <= 1]
    assert planned.computed_tokens == sum(step["computed_tokens"] for step in first_epoch)
    peak = max(step["peak_bytes"] for step in steps)
    assert planned.peak_bytes == pytest.approx(peak, rel=MEMORY_TOLERANCE)
    assert 0 < planned.train_seconds < planned.seconds


def test_each_change_names_settings_that_the_recipe_takes(recipe: Path, planned: Trial) -> None:
    loaded = load_recipe(recipe)
    changes = changes_for(loaded, planned)
    assert {name for change in changes for name in change.settings} >= {
        "train.micro_batch_tokens",
        "train.checkpoint_activations",
    }
    for change in changes:
        assert with_settings(loaded, change.settings) != loaded


def test_changes_are_added_until_the_run_fits(recipe: Path) -> None:
    loaded, tried = load_recipe(recipe), list[Forecast]()
    first = forecast(loaded, "mlx")
    found = fitting(loaded, "mlx", first, first.trial.needed_bytes - 1, tried.append)
    assert found is tried[-1]
    assert found.trial.peak_bytes < first.trial.peak_bytes
    assert found.trial.needed_bytes < first.trial.needed_bytes
    settings = {name: value for change in found.changes for name, value in change.settings.items()}
    assert with_settings(loaded, settings) == found.recipe


def test_the_recipe_that_fits_is_written_once(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fits.yaml"
    command = ["plan", str(recipe), "--fit", "4GB", "--out", str(out), "--backend", "mlx"]
    assert call([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"]["settings"] == {}  # it fits as it is
    assert load_recipe(out) == load_recipe(recipe)
    assert call(command) == 2  # never overwritten
    assert "exists already" in capsys.readouterr().err


def test_what_fits_nowhere_is_said(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fits.yaml"
    settings = ["--set", "train.micro_batch_tokens=1", "--set", "train.checkpoint_activations=true"]
    settings += ["--set", "data.too_long=error", "--set", "adapter.layers=1"]
    assert call(["plan", str(recipe), *settings, "--fit", "1MB", "--out", str(out), "--backend", "mlx"]) == 6
    assert not out.exists()
    assert "no change that is known here" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["", "eight", "-1GB"])
def test_a_size_that_is_none(recipe: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["plan", str(recipe), "--fit", size or "GB"]) == 2
    assert "--fit" in capsys.readouterr().err


def test_a_mac_on_paper(recipe: Path, planned: Trial) -> None:
    loaded = load_recipe(recipe)
    small, large = on_paper("m2-16gb", loaded, planned), on_paper("M2-Max-64GB", loaded, planned)
    assert small.seconds / large.seconds == pytest.approx(TERAFLOPS["m2-max"] / TERAFLOPS["m2"])
    assert large.memory_bytes == 48 * 2**30
    assert small.needed_bytes == large.needed_bytes
    for name in ("m2", "m9-16gb", "pc-16gb"):
        with pytest.raises(UsageError, match="no Mac that is known"):
            on_paper(name, loaded, planned)
