"""`mlxsft recipes`: what lands on stdout, on stderr and in files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlxsft.cli.recipes import recipes
from mlxsft.errors import UsageError
from mlxsft.recipe import load_recipe, recipe_schema


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(recipes, [str(argument) for argument in arguments])


def refused(*arguments: str | Path) -> UsageError:
    error = run(*arguments).exception
    assert isinstance(error, UsageError)
    return error


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: org/name\ndata: {train: rows.jsonl}\n")
    return path


@pytest.fixture
def mlx_lm(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    path = tmp_path / "lora_config.yaml"
    path.write_text(f"model: org/name\ndata: {json.dumps(str(tmp_path / 'data'))}\niters: 7\n")
    return path


def test_schema_prints_the_json_schema() -> None:
    result = run("schema")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == recipe_schema()


def test_show_prints_a_recipe_that_loads_as_the_same(recipe: Path, tmp_path: Path) -> None:
    result = run("show", recipe, "--set", "train.seed=7", "--set", "eval.patience=2")
    assert result.exit_code == 0
    again = tmp_path / "elsewhere" / "again.yaml"
    again.parent.mkdir()
    again.write_text(result.stdout)
    assert load_recipe(again) == load_recipe(recipe, ["train.seed=7", "eval.patience=2"])


def test_show_refuses_with_every_problem_of_the_file_and_of_the_options(recipe: Path) -> None:
    recipe.write_text("model: org/name\ndata: {train: rows.jsonl, trian: x}\n")
    error = refused("show", recipe, "--set", "train.rank=1")
    assert error.exit_code == 2
    assert error.message.splitlines() == [
        f"{recipe}:2: data.trian: no such setting; did you mean train?",
        "--set train.rank=1: no such setting; did you mean adapter.rank?",
    ]


def test_import_prints_the_recipe_on_stdout_and_the_notes_on_stderr(mlx_lm: Path, tmp_path: Path) -> None:
    result = run("import", mlx_lm)
    assert result.exit_code == 0
    assert "no valid.jsonl" in result.stderr
    imported = tmp_path / "imported.yaml"
    imported.write_text(result.stdout)
    assert load_recipe(imported).train.steps == 7


def test_import_writes_a_file_once_and_again_only_with_force(mlx_lm: Path, tmp_path: Path) -> None:
    out = tmp_path / "imported.yaml"
    assert run("import", mlx_lm, "--out", out).stdout == ""
    assert load_recipe(out).train.steps == 7
    mlx_lm.write_text(mlx_lm.read_text().replace("7", "9"))
    error = refused("import", mlx_lm, "--out", out)
    assert error.message == f"{out}: is there already"
    assert error.hint is not None
    assert "--force" in error.hint
    assert load_recipe(out).train.steps == 7
    assert run("import", mlx_lm, "--out", out, "--force").exit_code == 0
    assert load_recipe(out).train.steps == 9


def test_import_into_a_folder_that_is_not_there_is_a_sentence(mlx_lm: Path, tmp_path: Path) -> None:
    assert "cannot be written" in refused("import", mlx_lm, "--out", tmp_path / "none" / "x.yaml").message


def test_a_refused_import_leaves_no_file(mlx_lm: Path, tmp_path: Path) -> None:
    mlx_lm.write_text(mlx_lm.read_text() + "optimizer: muon\n")
    assert "muon" in refused("import", mlx_lm, "--out", tmp_path / "x.yaml").message
    assert not (tmp_path / "x.yaml").exists()


def test_the_commands_import_nothing_heavy() -> None:
    file = Path(sys.modules["mlxsft.cli.recipes"].__file__ or "")
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('commands', {str(file)!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
        "assert not {'pydantic', 'yaml', 'numpy', 'mlx', 'rich'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
