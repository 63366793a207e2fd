"""The house rules that a machine can check."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mlxsft.recipe import load_recipe
from tests.tiny import write_llama
from tests.training.test_run import events, train

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted((ROOT / "mlxsft").rglob("*.py"))


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]])
def test_linters_and_types_have_nothing_to_say(command: list[str]) -> None:
    ran = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def imports(module: Path) -> set[str]:
    """Top-level packages that a module imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda m: str(m.relative_to(ROOT)))
def test_array_libraries_are_imported_in_the_backends_only(module: Path) -> None:
    if module.parent.name != "backends":
        assert not imports(module) & {"mlx", "mlx_lm", "torch", "peft"}
    elif not module.stem.startswith("torch"):
        assert not imports(module) & {"torch", "peft"}


def test_no_module_is_a_drawer_for_everything() -> None:
    assert not {m.stem for m in MODULES} & {"utils", "common", "helpers", "misc"}


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda r: r.name)
def test_every_recipe_runs(recipe: Path, tmp_path: Path) -> None:
    load_recipe(recipe)
    model = write_llama(tmp_path / "model")
    assert train(recipe, tmp_path / "run", f"model={model}", "train.steps=2", "data.max_tokens=128") == 0
    assert len(events(tmp_path / "run", "step")) == 2
