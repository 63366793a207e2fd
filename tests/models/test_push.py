"""What goes to the Hub and what does not; huggingface_hub itself uploads it to a Hub on this machine."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mlxsft.cli import call
from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.push import card_of, plan_push
from tests.hub import FIRST, Hub, environment
from tests.tiny import write_llama

PASSPORT = {
    "base": {"name": "org/base", "commit": "c" * 40},
    "data": {"train.jsonl": "d" * 64},
    "recipe": {"model": "org/base", "data": {"train": ["rows.jsonl", {"path": "hf://tatsu-lab/alpaca:train[:9]"}]}},
    "versions": {"mlxsft": "1.2.3", "mlx": "0.32"},
}


def write_run(folder: Path) -> Path:
    """A run folder as training leaves it, with everything in it that must not go."""
    from numpy import ones

    (folder / "checkpoints" / "step-0000200").mkdir(parents=True)
    for name in ("adapters.safetensors", "checkpoints/step-0000200/state.safetensors"):
        module = "model.layers.0.self_attn.q_proj"
        save_file({f"{module}.lora_a": ones((4, 2)), f"{module}.lora_b": ones((2, 4))}, folder / name)
    parameters = {"rank": 2, "scale": 2.0, "dropout": 0.0}
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": parameters, "mlxsft": PASSPORT}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "events.jsonl").write_text('{"sample": "what a row said"}\n')
    (folder / "train.jsonl").write_text('{"prompt": "secret plans"}\n')
    (folder / "recipe.yaml").write_text("model: /home/tom/models/base\n")
    (folder / "lock.json").write_text("{}")
    (folder / "notes.md").write_text("My key is hf_" + "aB3dE6gH9jK2" * 3)
    (folder / "helper.py").write_text("print()")
    (folder / ".DS_Store").write_bytes(b"\0")
    answers = [{"question": "q", "tuned": "a row's answer"}]
    card = {"metrics": {"loss": {"before": 2.5, "after": 1.25, "verdict": "better"}}, "answers": answers}
    (folder / "card.json").write_text(json.dumps(card))
    return folder


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "pip")


def front(card: str) -> dict[str, Any]:
    facts: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return facts


# ---- what goes ------------------------------------------------------------------------------------------------------


def test_a_run_goes_without_what_is_private(run_folder: Path) -> None:
    (run_folder / "notes.md").unlink()
    plan = plan_push(run_folder, "me/pip")
    assert list(plan.sizes) == ["README.md", "adapter_config.json", "adapters.safetensors"]
    why = {name: reason.partition(" (")[0] for name, reason in plan.left_out.items()}
    assert why == {
        ".DS_Store": "hidden",
        "card.json": "quotes rows",
        "checkpoints/step-0000200/state.safetensors": "checkpoints and optimizer state",
        "events.jsonl": "logs",
        "helper.py": "code and pickle",
        "lock.json": "of a run: its paths are those of this machine",
        "recipe.yaml": "a path of this machine",
        "train.jsonl": "rows",
    }


def test_an_adapter_that_nobody_could_load_stays(run_folder: Path) -> None:
    (run_folder / "notes.md").unlink()
    tensors = load_file(run_folder / "adapters.safetensors")
    next(iter(tensors.values())).flat[0] = np.nan
    save_file(tensors, run_folder / "adapters.safetensors")
    with pytest.raises(InputRefused, match="not finite"):
        plan_push(run_folder, "me/pip")


def test_a_secret_stops_the_push(run_folder: Path) -> None:
    with pytest.raises(InputRefused, match=r"notes\.md: a secret \(Hugging Face token hf_a…\)"):
        plan_push(run_folder, "me/pip")


@pytest.mark.parametrize("path", ["/Users/tom/rows", "C:\\Users\\tom\\rows", "/home/tom/x", "/mnt/disk/base"])
def test_a_path_in_what_the_model_needs_stops_the_push(tmp_path: Path, path: str) -> None:
    model = write_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"_name_or_path": path}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=r"config\.json: a path of this machine"):
        plan_push(model, "me/model")


def test_a_link_out_of_the_folder_stays(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model")
    (tmp_path / "diary.txt").write_text("dear diary")
    (model / "diary.txt").symlink_to(tmp_path / "diary.txt")
    plan = plan_push(model, "me/model")
    assert plan.left_out == {"diary.txt": "a link that leaves the folder"}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= plan.sizes.keys()


def test_names_that_are_none_and_folders_without_weights_are_refused(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="no name of a repository"):
        plan_push(tiny_llama, "not a name/at/all")
    with pytest.raises(InputRefused, match="holds no weights"):
        plan_push(tmp_path, "me/nothing")


# ---- the card -------------------------------------------------------------------------------------------------------


def test_the_card_says_what_the_adapter_is_of(run_folder: Path) -> None:
    card = card_of(run_folder)
    assert front(card) == {
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "datasets": ["tatsu-lab/alpaca"],
        "tags": ["mlxsft", "lora"],
    }
    for said in (f"- train.jsonl, SHA-256 {'d' * 64}", "model: org/base", "- loss: before 2.5, after 1.25", "mlx 0.32"):
        assert said in card
    assert "a row's answer" not in card


@pytest.mark.parametrize("packed", [True, False])
def test_the_card_tells_a_quantized_model_from_a_tuned_one(tmp_path: Path, packed: bool) -> None:
    model = write_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    if packed:
        config["quantization"] = {"group_size": 64, "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    assert ("A smaller form of" in card_of(model)) == packed
    assert "base_model" not in front(card_of(model))  # nobody knows it


# ---- the Hub --------------------------------------------------------------------------------------------------------

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def pushed(hub: Hub, tmp_path: Path) -> Push:
    """`mlxsft push` in a process of its own that knows this Hub and no other."""

    def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        known = {"HF_TOKEN": hub.writer, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "mlxsft", "push", *arguments],
            env={**environment(hub, tmp_path / "hf"), **known, **settings},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )

    return run


def test_everything_shown_arrives_in_one_commit(hub: Hub, pushed: Push, run_folder: Path) -> None:
    (run_folder / "notes.md").unlink()
    hub.repos["org/base"] = {"c" * 40: {"README.md": b"---\nlicense: apache-2.0\n---\n# Base\n", "config.json": b"{}"}}
    done = pushed(str(run_folder), "me/pip", "--yes", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["url"], told["commit"]) == (f"{hub.endpoint}/me/pip", FIRST)
    files = hub.repos["me/pip"][FIRST]
    assert {name: len(data) for name, data in files.items()} == told["files"]
    assert files["adapters.safetensors"] == (run_folder / "adapters.safetensors").read_bytes()
    card = files["README.md"].decode()
    assert front(card)["license"] == "apache-2.0"
    assert hub.private["me/pip"] is True
    assert [path for method, path, _ in hub.log if method == "POST" and "/commit/" in path] == [
        "/api/models/me/pip/commit/main"
    ]
    assert not (run_folder / "README.md").exists()


@pytest.mark.parametrize(
    ("settings", "status", "said"),
    [
        ({"HF_HUB_OFFLINE": "1"}, 200, "HF_HUB_OFFLINE is set"),
        ({"HF_TOKEN": "hf_reader"}, 200, "does not let this login write"),
        pytest.param({}, 403, "does not let this login write", marks=pytest.mark.long),
    ],
)
def test_a_hub_that_takes_nothing_exits_with_7(
    hub: Hub, pushed: Push, tmp_path: Path, settings: dict[str, str], status: int, said: str
) -> None:
    hub.status = status
    done = pushed(str(write_llama(tmp_path / "model")), "me/model", "--yes", **settings)
    assert done.returncode == 7
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not any(method == "PUT" for method, _, _ in hub.log)


def test_nothing_goes_before_somebody_says_so(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (run_folder / "notes.md").unlink()
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert call(["push", str(run_folder), "me/pip"]) == 2
    out, err = capsys.readouterr()
    assert "adapters.safetensors" in out
    assert "stays here: 8 files" in out
    assert "--yes" in err
    assert call(["push", str(run_folder), "me/pip", "--dry-run", "--json"]) == 0
    assert "train.jsonl" in json.loads(capsys.readouterr().out)["left_out"]
