"""Going on with a run: what is offered, what is refused with the difference, and what may change when it is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mlxsft.cli import call
from mlxsft.recipe import load_recipe
from mlxsft.training.checkpoints import RunFolder
from mlxsft.training.run import run_training
from tests.tiny import CHATML, write_llama
from tests.training.test_run import PAIRS, events, same_adapter, train, write_recipe, write_rows


def train_until(recipe: Path, run: Path, step: int) -> None:
    """A run that is stopped after a step."""
    made: list[int] = []
    for event in run_training(
        load_recipe(recipe), RunFolder(run), backend_name="mlx", resume=False, force=False,
        stop=lambda: len(made) >= step, tell=print,
    ):  # fmt: skip
        if event.kind == "step":
            made.append(1)


@pytest.fixture
def stopped(tmp_path: Path, tiny_llama: Path) -> Path:
    """A run that was stopped after three of six steps; its recipe is recipe.yaml beside it."""
    recipe = write_recipe(tmp_path, tiny_llama)
    train_until(recipe, tmp_path / "run", 3)
    return tmp_path / "run"


def resume(run: Path, *more: str) -> int:
    given = [
        word for argument in more for word in (argument.split("=", 1) if argument.startswith("--") else [argument])
    ]
    options = list(zip(given[::2], given[1::2], strict=True))
    overrides = [value for option, value in options if option == "--set"]
    allowed = [value for option, value in options if option == "--allow-change"]
    return train(run.parent / "recipe.yaml", run, *overrides, resume=True, allow_changes=allowed)


# --- refused with the difference, or allowed by name -----------------------------------------------------------------


def test_a_change_is_refused_with_the_difference_until_it_is_named(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lower = ["--set", "train.learning_rate=0.001", "--set", "train.warmup=0"]
    assert resume(stopped, *lower) == 2
    said = capsys.readouterr().err
    assert "train.learning_rate: 0.01 → 0.001" in said
    assert "train.warmup: 0.05 → 0" in said
    assert "--allow-change train.learning_rate --allow-change train.warmup" in said
    assert resume(stopped, *lower, "--allow-change", "learning_rate") == 2
    said = capsys.readouterr().err
    assert "train.warmup" in said
    assert "learning_rate" not in said
    assert resume(stopped, *lower, "--allow-change", "learning_rate", "--allow-change", "train.warmup") == 0
    assert [s["learning_rate"] <= 0.001 for s in events(stopped, "step")] == [False] * 3 + [True] * 3
    assert "changed since the run began: train.learning_rate: 0.01 → 0.001" in [
        e["message"] for e in events(stopped, "note")
    ]
    resolved = yaml.safe_load((stopped / "recipe.yaml").read_text())
    assert (resolved["train"]["learning_rate"], resolved["train"]["warmup"]) == (0.001, 0)
    assert train(stopped / "recipe.yaml", stopped, resume=True) == 0


@pytest.mark.parametrize(
    "setting", ["adapter.rank=8", "adapter.alpha=4", "adapter.layers=1", "adapter.targets=[q_proj]"]
)
def test_what_the_saved_adapter_is_made_of_cannot_change(
    stopped: Path, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = setting.partition("=")[0]
    assert resume(stopped, "--set", setting, "--allow-change", name) == 2
    said = capsys.readouterr().err
    assert f"{name}: " in said
    assert "this cannot change: the saved adapter" in said


def test_what_never_changes_the_result_needs_no_name_and_is_said(stopped: Path, tmp_path: Path) -> None:
    free = {"train.micro_batch_tokens": 64, "save.every": 1, "save.keep": 3, "eval.samples": ["hello"]}
    assert resume(stopped, *[f"--set={name}={value}" for name, value in free.items()]) == 0
    notes = [e["message"] for e in events(stopped, "note")]
    assert sorted(n.split(": ")[1] for n in notes if n.startswith("changed")) == sorted(free)
    assert len(list((stopped / "checkpoints").iterdir())) == 3


def test_saving_at_other_steps_leaves_the_same_bits(stopped: Path, tmp_path: Path) -> None:
    assert resume(stopped, "--set", "save.every=1") == 0
    assert train(tmp_path / "recipe.yaml", tmp_path / "straight") == 0
    assert same_adapter(stopped, tmp_path / "straight")


@pytest.mark.parametrize(
    ("name", "said"),
    [("every", "eval.every or save.every"), ("lr", "no such setting"), ("train", "data.train: ")],
)
def test_a_name_that_means_nothing_or_two_things_is_refused(
    stopped: Path, name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = ["--set", f"data.train={write_rows(stopped.parent / 'other.jsonl', PAIRS[::-1])}"]
    assert resume(stopped, *changed, "--allow-change", name) == (0 if name == "train" else 2)
    assert said in capsys.readouterr().err


def test_changed_rows_are_refused_until_data_is_named(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(stopped.parent / "rows.jsonl", PAIRS[::-1])
    assert resume(stopped) == 3
    said = capsys.readouterr().err
    assert f"data: the contents of {rows}" in said
    assert "--allow-change data" in said
    assert resume(stopped, "--allow-change", "data") == 0
    assert len(events(stopped, "step")) == 6
    assert resume(stopped) == 0  # the lock has the rows as they are now


def test_another_base_or_template_is_refused_until_it_is_named(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_llama(tmp_path / "other", seed=1)
    assert resume(stopped, "--set", f"model={other}") == 2
    said = capsys.readouterr().err
    assert "base: the contents of model.safetensors" in said
    template = tmp_path / "template.jinja"
    template.write_text(CHATML.replace("user", "person") + " ")
    assert resume(stopped, "--set", f"data.template={template}") == 2
    assert "data.template: null → " in capsys.readouterr().err
    assert resume(stopped, "--set", f"data.template={template}", "--allow-change", "template") == 0
    assert resume(stopped, "--set", f"data.template={template}", "--set", f"model={other}", "--allow-change=base") == 0


def test_rows_and_base_that_moved_are_the_same(stopped: Path, tmp_path: Path, tiny_llama: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.copytree(tiny_llama, moved / "model")
    rows = shutil.copy(tmp_path / "rows.jsonl", moved / "my.jsonl")
    assert resume(stopped, "--set", f"model={moved / 'model'}", "--set", f"data.train={rows}") == 0
    assert train(tmp_path / "recipe.yaml", tmp_path / "straight") == 0
    assert same_adapter(stopped, tmp_path / "straight")


def test_other_versions_are_said(stopped: Path) -> None:
    lock = json.loads((stopped / "lock.json").read_text())
    lock["versions"]["numpy"] = "1.0"
    (stopped / "lock.json").write_text(json.dumps(lock))
    assert resume(stopped) == 0
    assert any(e["message"].startswith("numpy was 1.0 when the run began") for e in events(stopped, "note"))


# --- finished runs ---------------------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_goes_on_when_its_length_is_raised(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resume(stopped) == 0
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert resume(stopped) == 0
    assert "this run is finished, after 6 of 6 steps" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before
    assert resume(stopped, "--set", "train.epochs=3") == 2
    said = capsys.readouterr().err
    assert "train.epochs: null → 3" in said
    assert "train.steps: 6 → null" in said
    assert resume(stopped, "--set", "train.epochs=3", "--allow-change", "epochs") == 0
    assert [s["step"] for s in events(stopped, "step")] == list(range(1, 10))


def test_a_constant_rate_and_a_raised_length_are_one_longer_run(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, train__schedule="constant", train__warmup=0, save__every=1)
    run = tmp_path / "run"
    assert train(recipe, run, "train.steps=4") == 0
    assert resume(run, "--allow-change", "steps") == 0
    assert train(recipe, tmp_path / "straight") == 0
    assert same_adapter(run, tmp_path / "straight")


# --- what is offered -------------------------------------------------------------------------------------------------


def test_outside_a_terminal_the_command_that_goes_on_is_given(
    stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(stopped.parent / "recipe.yaml")
    assert call(["train", recipe, "--out", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert "step 3 of 6 is saved" in said
    command = said[said.index("mlxsft train") :].partition(". ")[0].split()
    assert call(command[1:]) == 0
    assert call(["train", recipe, "--out", str(stopped)]) == 2
    assert "finished" in capsys.readouterr().err


def test_a_second_run_in_the_folder_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()}
    with RunFolder(stopped).held():
        assert resume(stopped) == 2
        assert train(stopped.parent / "recipe.yaml", stopped, force=True) == 2
    assert capsys.readouterr().err.count("another run is at work in this folder") == 2
    assert {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file()} == before


def test_allow_change_is_for_a_run_that_is_resumed(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    assert call(["train", str(recipe), "--out", str(tmp_path / "run"), "--allow-change", "steps"]) == 2
    assert not (tmp_path / "run").exists()


def test_a_run_that_saved_nothing_says_so(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(stopped / "checkpoints")
    assert call(["train", str(stopped.parent / "recipe.yaml"), "--out", str(stopped)]) == 2
    assert "holds a run already; nothing of it is saved yet" in capsys.readouterr().err
    assert resume(stopped) == 0
    assert [s["step"] for s in events(stopped, "step")] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_offered_while_a_run_is_at_work(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(stopped).held():
        assert call(["train", str(stopped.parent / "recipe.yaml"), "--out", str(stopped)]) == 2
    said = capsys.readouterr().err
    assert "another run is at work in this folder" in said
    assert "--resume" not in said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
@pytest.mark.parametrize(("answer", "code", "steps"), [("n", 2, 3), ("", 0, 6)])
def test_in_a_terminal_an_unfinished_run_is_offered(stopped: Path, answer: str, code: int, steps: int) -> None:
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "mlxsft", "train", str(stopped.parent / "recipe.yaml"), "--out", str(stopped)]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        os.write(ours, f"{answer}\n".encode())
        said = b""
        while chunk := read(ours):
            said += chunk
    os.close(ours)
    assert process.returncode == code
    assert b"step 3 of 6 is saved. Go on? [Y/n]" in said
    assert len(events(stopped, "step")) == steps


def read(terminal: int) -> bytes:
    """What a terminal shows next; nothing when its program has ended."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # Linux says so with EIO
        return b""
