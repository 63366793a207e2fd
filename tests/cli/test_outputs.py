"""What is there already: every command that writes says the same, with the same exit code, and replaces nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlxsft.cli import call
from tests.training.test_run import write_recipe

COMMANDS = {
    "data convert": "data convert ROWS --out THERE",
    "data split": "data split ROWS --out FOLDER",
    "data check": "data check ROWS --model MODEL --html THERE",
    "plan": "plan RECIPE --fit 8GB --out THERE",
    "recipes import": "recipes import MLX_LM --out THERE",
    "runs show": "runs show RUN --html THERE",
    "eval": "eval RUN --out FOLDER",
    "eval --compare": "eval RUN RUN --compare --html THERE",
    "generate": "generate MODEL --input ROWS --output THERE",
    "train": "train RECIPE --out RUN",
    "quickstart": "quickstart --out RUN",
    "fuse": "fuse MODEL RUN FOLDER",
    "convert": "convert MODEL FOLDER",
    "quantize": "quantize MODEL FOLDER",
    "pull": "pull MODEL FOLDER",
    "export": "export RUN FOLDER --to peft",
    "export gguf": "export RUN THERE --to gguf",
    "export ollama": "export RUN FOLDER --to ollama",
    "import": "import PEFT FOLDER --model MODEL",
    "merge": "adapters merge RUN TWIN --out FOLDER",
}
KEPT = "not to be lost"


@pytest.fixture(scope="module")
def places(tuned: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the capitals in COMMANDS stand for."""
    at = tmp_path_factory.mktemp("outputs")
    (at / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    (at / "mlx_lm.yaml").write_text(f"model: {tuned[0]}\ndata: {at}\niters: 1\n")
    shutil.copytree(tuned[1], at / "twin")
    assert call(["export", str(tuned[1]), str(at / "peft"), "--to", "peft"]) == 0
    for name in ("train.jsonl", "card.html", "Modelfile"):
        (at / "folder" / name).parent.mkdir(exist_ok=True)
        (at / "folder" / name).write_text(KEPT)
    (at / "there").write_text(KEPT)
    return {
        "ROWS": str(at / "train.jsonl"),
        "MODEL": str(tuned[0]),
        "RUN": str(tuned[1]),
        "TWIN": str(at / "twin"),
        "PEFT": str(at / "peft"),
        "RECIPE": str(write_recipe(at, tuned[0])),
        "MLX_LM": str(at / "mlx_lm.yaml"),
        "THERE": str(at / "there"),
        "FOLDER": str(at / "folder"),
    }


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_what_is_there_already_stays_and_the_exit_code_is_2(
    command: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([places.get(word, word) for word in command.split()]) == 2
    told = capsys.readouterr().err
    assert "already" in told
    assert "--force" in told
    kept = [Path(places["THERE"]), *Path(places["FOLDER"]).iterdir()]
    assert [file.read_text() for file in kept] == [KEPT] * 4
