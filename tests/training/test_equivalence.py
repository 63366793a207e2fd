"""What decides only how a run is computed leaves its numbers alone: trajectories of 24 updates, with dropout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.test_run import events, train, write_recipe

# Eight rows in updates of three, so that an epoch has a smaller one; one layer below the adapter.
SETTINGS = {
    "train__steps": 24,
    "train__batch_size": 3,
    "train__cache_trunk": "off",
    "adapter__layers": 1,
    "adapter__dropout": 0.1,
    "data__valid": 0.2,
    "eval__every": 4,
    "save__every": 24,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """The run whose updates are computed at once."""
    folder = tmp_path_factory.mktemp("equivalence")
    assert train(write_recipe(folder, tiny_llama, **SETTINGS), folder / "run", "train.micro_batch_tokens=4096") == 0
    return folder / "run"


def drift(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """The largest and the mean relative difference."""
    differences = np.abs(one / other - 1)
    return float(differences.max()), float(differences.mean())


@pytest.mark.parametrize(
    "setting",
    [
        "train.micro_batch_tokens=80",  # two micro-batches an update
        "train.micro_batch_tokens=1",  # a row each
        "train.batching=packed",
        "train.cache_trunk=memory",
        "train.cache_trunk=disk",
        "train.checkpoint_activations=true",
    ],
)
def test_runs_that_differ_in_how_they_are_computed_have_the_same_numbers(
    whole: Path, tmp_path: Path, setting: str
) -> None:
    overrides = [setting] if "micro" in setting else ["train.micro_batch_tokens=4096", setting]
    assert train(whole.parent / "recipe.yaml", tmp_path / "run", *overrides) == 0
    for kind in ("step", "eval"):
        one, other = (np.array([e["loss"] for e in events(run, kind)]) for run in (tmp_path / "run", whole))
        assert len(one) == {"step": 24, "eval": 7}[kind]
        largest, mean = drift(one, other)
        assert largest < 1e-6, (kind, largest, mean)
        assert mean < 2e-7, (kind, largest, mean)
    a, b = (load_file(run / "adapters.safetensors") for run in (tmp_path / "run", whole))
    differences = np.concatenate([np.abs(a[name] - b[name]).ravel() for name in b])
    assert differences.max() < 2e-5
    assert differences.mean() < 1e-7
    computed = [sum(e["computed_tokens"] for e in events(run, "step")) for run in (tmp_path / "run", whole)]
    if "cache" not in setting and "activations" not in setting:
        assert computed[0] != computed[1]  # it was computed differently indeed
    assert bool(events(tmp_path / "run", "trunk")) == ("cache" in setting)
