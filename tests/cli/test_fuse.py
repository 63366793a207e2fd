"""`mlxsft fuse`: what it prints, what it returns, and what lies beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlxsft.cli import call
from mlxsft.models.adapter import load_adapter
from tests.tiny import write_llama
from tests.training.test_run import train, write_recipe

OWN = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model without a chat template, and a run on it with one and with rows held out."""
    folder = tmp_path_factory.mktemp("tuned")
    model = write_llama(folder / "model", width=64, chat_template=None, eos="<|endoftext|>")
    (folder / "own.jinja").write_text(OWN)
    recipe = write_recipe(
        folder, model, data__valid=0.3, data__template=str(folder / "own.jinja"),
        train={"steps": 30, "batch_size": 4, "learning_rate": 0.005}, save__every=1.0,
    )  # fmt: skip
    assert train(recipe, folder / "run") == 0
    return model, folder / "run"


def test_the_fused_model_answers_as_base_and_adapter(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the adapter's template, which comes along, and up to its end token."""
    model, run = tuned
    expected, answers = None, []
    for backend in ("mlx", "torch"):
        out = tmp_path / backend
        assert call(["fuse", str(model), str(run), str(out), "--backend", backend]) == 0
        said = capsys.readouterr()
        assert said.out.startswith(f"{out}: ")
        assert "of the rows that the run held out: 100.0% of the tuning survived" in said.out
        assert said.err == ""
        assert call(["verify", str(out)]) == 0
        assert (out / "chat_template.jinja").read_text() == OWN
        assert 2 in json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        card, lock = (out / "README.md").read_text(), (out / "lock.json").read_text()
        assert f"mlxsft fuse model run {backend}" in card
        assert "100.0% of the tuning survived" in card
        assert json.loads(lock)["made"]["adapter_sha256"] in card
        assert str(tmp_path) not in card + lock
        assert str(run.parent) not in card + lock
        capsys.readouterr()
        assert call(["generate", str(model), "Who are you?", "--adapter", str(run), "--max-tokens", "12"]) == 0
        expected = capsys.readouterr().out
        assert call(["generate", str(out), "Who are you?", "--max-tokens", "12"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers == [expected, expected]


def test_too_little_left_is_exit_6_and_no_folder(
    tuned: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, run = tuned
    out, rows = tmp_path / "out", str(run.parent / "rows.jsonl")
    command = ["fuse", str(model), str(run), str(out), "--check", rows, "--json"]
    assert call([*command, "--bits", "2", "--min-survival", "0.999"]) == 6
    said = capsys.readouterr()
    told = json.loads(said.out)
    assert told["kept"] is False
    assert told["survival"]["share"] < 0.999
    assert told["survival"]["share"] == pytest.approx(1 - told["survival"]["kl"] / told["survival"]["effect_kl"])
    assert "Most is lost in model." in said.err
    assert f"It would survive with {told['held_by']}." in " ".join(said.err.split())
    assert list(tmp_path.iterdir()) == []
    assert call([*command, "--bits", "auto", "--min-survival", "0.5"]) == 0
    auto = json.loads(capsys.readouterr().out)
    assert auto["kept"] is True
    assert auto["survival"]["share"] >= 0.5
    assert call(command) == 2
    assert "is there already" in capsys.readouterr().err
    assert call([*command, "--check", "none", "--force"]) == 0
    assert json.loads(capsys.readouterr().out)["survival"] is None


def test_rows_that_are_gone_are_said(tuned: tuple[Path, Path], tmp_path: Path) -> None:
    """A copy of the adapter alone has no rows: the built-in text is taken."""
    from mlxsft.models.fuse import FuseSettings, fuse
    from mlxsft.models.survival import Survival

    model, run = tuned
    (tmp_path / "run").mkdir()
    for name in ("adapters.safetensors", "adapter_config.json", "recipe.yaml"):
        (tmp_path / "run" / name).write_bytes((run / name).read_bytes())
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("rows.jsonl", "gone.jsonl"))
    assert load_adapter(tmp_path / "run").tensors
    done = fuse(str(model), tmp_path / "run", tmp_path / "out", FuseSettings())
    assert isinstance(done.survival, Survival)
    assert done.survival.rows == "the built-in text"
    assert "give --check" in done.notes[0]


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "4", "--backend", "torch"], 2, "MLX alone packs numbers"),
        (["--check", "nowhere.jsonl"], 3, "--check nowhere.jsonl: "),
        (["--bits", "auto", "--check", "none"], 2, "--bits auto needs to measure"),
        (["--mode", "mxfp4", "--bits", "8"], 2, "--bits 8: mxfp4 has 4"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tuned: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    code: int,
    words: str,
) -> None:
    assert call(["fuse", str(tuned[0]), str(tuned[1]), str(tmp_path / "out"), *options]) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
