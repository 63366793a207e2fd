"""The trunk cache of a run: when there is one, where, and that it changes nothing but the time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mlxsft.backends import load_backend
from mlxsft.data.dataset import load_dataset
from mlxsft.data.render import load_renderer
from mlxsft.models.source import open_model
from mlxsft.recipe import DataRecipe
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from mlxsft.training.trunk import TrunkCache
from tests.tiny import write_llama
from tests.training.test_run import events, same_adapter, train, write_recipe, write_rows


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of four layers."""
    return write_llama(tmp_path_factory.mktemp("deep"), layers=4)


def trained(folder: Path, model: Path, where: str, **changes: Any) -> Path:
    """A run of six updates over ten rows, two epochs, with the adapter in the upper two layers."""
    settings = {"adapter__layers": 2, "train__cache_trunk": where, "data__valid": 0.2, **changes}
    recipe = write_recipe(folder, model, **settings)
    assert train(recipe, folder / where) == 0
    return folder / where


def test_memory_disk_and_off_train_the_same(tmp_path: Path, deep: Path) -> None:
    off, memory, disk = (trained(tmp_path, deep, where) for where in ("off", "memory", "disk"))
    assert same_adapter(memory, disk)
    one, other = (load_file(run / "adapters.safetensors") for run in (off, memory))
    assert (
        max(float(np.abs(one[name] - other[name]).max()) for name in one) < 1e-4
    )  # of values that moved by up to 0.06
    assert not events(off, "trunk")
    for run in (memory, disk):
        last = events(run, "trunk")[-1]
        tokens = last["bytes"] / (32 * 4)
        assert (last["layers"], last["place"], last["done"]) == (2, run.name, 1.0)
        assert tokens == int(tokens)
        assert [e["loss"] for e in events(run, "eval")] == pytest.approx([e["loss"] for e in events(off, "eval")])


def test_auto_keeps_it_only_where_rows_are_seen_again(tmp_path: Path, deep: Path) -> None:
    (tmp_path / "once").mkdir()
    (tmp_path / "again").mkdir()
    once = trained(tmp_path / "once", deep, "auto", train__steps=2)
    again = trained(tmp_path / "again", deep, "auto", train__steps=4)
    assert not events(once, "trunk")
    assert events(again, "trunk")[-1]["place"] == "memory"


def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, deep: Path) -> None:
    """It computes the trunk anew, and decides as the run did that it goes on with."""
    from tests.training.test_run import events as read  # the run is killed after its first checkpoint

    straight = trained(tmp_path, deep, "auto")
    recipe = write_recipe(tmp_path, deep, adapter__layers=2, train__cache_trunk="auto", data__valid=0.2)
    run = tmp_path / "killed"
    kill_at(recipe, run, step=4)
    assert train(recipe, run, resume=True) == 0
    assert len([e for e in read(run, "trunk") if e["done"] == 1.0]) >= 1
    assert same_adapter(straight, run)


def kill_at(recipe: Path, run: Path, step: int) -> None:
    """Train in a process of its own that kills itself when the checkpoint of `step` is written."""
    import subprocess
    import sys

    script = (
        "import os, signal, sys\n"
        "from mlxsft.training import run as module\n"
        "save = module.Ready._save\n"
        "def then_die(self, progress):\n"
        "    event = save(self, progress)\n"
        f"    if progress.step == {step}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return event\n"
        "module.Ready._save = then_die\n"
        "from pathlib import Path\n"
        "from tests.training.test_run import train\n"
        f"sys.exit(train(Path({str(recipe)!r}), Path({str(run)!r})))\n"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True).returncode == -signal.SIGKILL


def test_samples_are_answered_although_the_lower_layers_were_released(tmp_path: Path, deep: Path) -> None:
    run = trained(tmp_path, deep, "memory", eval={"samples": ["Who are you?"], "every": 2})
    (tmp_path / "whole").mkdir()
    whole = trained(tmp_path / "whole", deep, "off", eval={"samples": ["Who are you?"], "every": 2})
    answers = [[e["answer"] for e in events(r, "sample")] for r in (run, whole)]
    assert len(answers[0]) == 4
    assert answers[0] == answers[1]


def test_a_wish_that_cannot_be_met_is_said(tmp_path: Path, deep: Path) -> None:
    run = trained(tmp_path, deep, "memory", adapter__layers="all")
    assert not events(run, "trunk")
    assert any("no layer below" in e["message"] for e in events(run, "note"))


def test_outputs_that_do_not_match_the_whole_model_are_not_used(tmp_path: Path, deep: Path) -> None:
    """A model with another rotation in its lower layers than when its outputs were taken."""
    source = open_model(str(deep))
    backend = load_backend("mlx", source)
    backend.attach(AdapterRecipe(rank=2, layers=2), 0)
    backend.optimize(TrainRecipe(steps=1))
    renderer = load_renderer(source, None)
    rows = load_dataset(DataRecipe(train=str(write_rows(tmp_path / "rows.jsonl")), valid=None), renderer, seed=0).train
    outputs = backend.trunk

    class Wrong:
        """The backend, but for trunk outputs that are a hundredth too large."""

        def __getattr__(self, name: str) -> Any:
            return getattr(backend, name)

        def trunk(self, batch: Any) -> Any:
            return 1.01 * outputs(batch)

    cache = TrunkCache(Wrong(), "memory", tmp_path, 4096, None)  # type: ignore[arg-type]  # it is a backend at work
    (note,) = cache.fill([rows], repeated=True, stop=lambda: False)
    assert "the loss of a token then differs by" in note.message  # type: ignore[attr-defined]  # a Noted
    assert not cache.used
    assert all(row.trunk is None for row in cache.rows[0])
