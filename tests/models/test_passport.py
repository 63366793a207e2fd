"""What an adapter says of its base is checked wherever it is loaded, and what it does not say is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsft import __version__
from mlxsft.cli import call
from mlxsft.errors import InputRefused
from mlxsft.models.adapter import load_adapter, save_adapter
from mlxsft.models.passport import load_adapter_for, tokenizer_hash
from mlxsft.models.source import open_model
from tests.tiny import write_llama
from tests.training.test_run import train, write_recipe


@pytest.fixture(scope="module")
def run(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on the tiny Llama."""
    folder = tmp_path_factory.mktemp("run")
    recipe = write_recipe(folder, tiny_llama, adapter={"rslora": True}, train={"steps": 2})
    assert train(recipe, folder / "run") == 0
    return folder / "run"


@pytest.fixture
def adapter(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's adapter, whose config may be changed."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in ("adapters.safetensors", "adapter_config.json"):
        shutil.copy(run / file, folder)
    return folder


def edit(folder: Path, **change: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_run_writes_everything_that_its_adapter_belongs_to(run: Path, tiny_llama: Path) -> None:
    passport, source = load_adapter(run).config["mlxsft"], open_model(str(tiny_llama))
    base = passport["base"]
    assert passport["version"] == passport["versions"]["mlxsft"] == __version__
    assert base["sha256"] == source.hashes()
    assert (base["name"], base["commit"], base["model_type"]) == (tiny_llama.name, None, "llama")
    assert (base["quantization"], base["tied"]) == (None, True)
    assert passport["tokenizer"]["sha256"] == tokenizer_hash(source.hashes())
    assert passport["recipe"]["adapter"]["rslora"] is True
    assert passport["recipe"]["train"]["steps"] == 2
    assert all(len(sha) == 64 for sha in (*passport["data"].values(), passport["template"]["sha256"]))
    assert str(tiny_llama.parent) not in json.dumps(passport)


def test_what_belongs_together_has_nothing_to_say(run: Path, tiny_llama: Path) -> None:
    adapter, notes = load_adapter_for(open_model(str(tiny_llama)), run)
    assert notes == []
    assert len(adapter.tensors) == 28


def test_another_base_is_refused(run: Path, tmp_path: Path) -> None:
    twin = write_llama(tmp_path / "twin", seed=1)
    with pytest.raises(InputRefused, match="trained on other weights"):
        load_adapter_for(open_model(str(twin)), run)


def test_another_tokenizer_is_refused(run: Path, tiny_llama: Path, tmp_path: Path) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(tiny_llama, twin)
    tokenizer = json.loads((twin / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (twin / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputRefused, match="trained with another tokenizer"):
        load_adapter_for(open_model(str(twin)), run)


@pytest.mark.parametrize(
    ("passport", "words"),
    [
        (None, "it has no passport of mlxsft's to say which weights and tokenizer"),
        ({"base": {"name": "x", "sha256": {}}}, "its passport does not say which weights and tokenizer"),
        ([1], "it has no passport"),
    ],
)
def test_what_cannot_be_checked_is_said(
    adapter: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], passport: Any, words: str
) -> None:
    edit(adapter, mlxsft=passport)
    capsys.readouterr()
    assert call(["generate", str(tiny_llama), "hello", "--adapter", str(adapter), "--max-tokens", "2"]) == 0
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_a_foreign_adapter_that_lacks_a_layers_module_is_refused_with_its_name(
    adapter: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    edit(adapter, mlxsft=None)
    loaded, gone = load_adapter(adapter), "model.layers.1.mlp.up_proj"
    tensors = {name: tensor for name, tensor in loaded.tensors.items() if not name.startswith(f"{gone}.")}
    extra = {"lora_a": np.zeros((32, 16), np.float32), "lora_b": np.zeros((16, 64), np.float32)}
    tensors |= {f"model.layers.9.mlp.up_proj.{leaf}": tensor for leaf, tensor in extra.items()}
    save_adapter(adapter, tensors, loaded.config)
    command = ["generate", str(tiny_llama), "hello", "--adapter", str(adapter), "--backend", backend]
    assert call(command) == InputRefused.exit_code
    said = capsys.readouterr().err
    assert f"{gone}.lora_a: is missing" in said
    assert f"{gone}.lora_b: is missing" in said
    assert "model.layers.9.mlp.up_proj.lora_a: the model has no such tensor" in said


def test_an_rslora_run_is_an_rslora_of_pefts(run: Path, tmp_path: Path) -> None:
    assert call(["export", str(run), str(tmp_path / "peft"), "--to", "peft"]) == 0
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    recipe = load_adapter(run).config["mlxsft"]["recipe"]["adapter"]
    assert (config["use_rslora"], config["r"], config["lora_alpha"]) == (True, recipe["rank"], recipe["alpha"])
    assert call(["import", str(tmp_path / "peft"), str(tmp_path / "back")]) == 0
    for file in ("adapters.safetensors", "adapter_config.json"):
        assert (tmp_path / "back" / file).read_bytes() == (run / file).read_bytes()


# ---- list, show, diff -----------------------------------------------------------------------------------------------


def said_as_json(capsys: pytest.CaptureFixture[str], *command: str) -> Any:
    capsys.readouterr()
    assert call(["adapters", *command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_list_finds_both_layouts_and_names_what_cannot_be_used(
    run: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(["export", str(adapter), str(tmp_path / "peft"), "--to", "peft"]) == 0
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_model.bin").touch()
    (tmp_path / "pickled" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapters.safetensors").write_bytes(b"12345678")
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    found = {Path(a["folder"]).name: a for a in said_as_json(capsys, "list", str(tmp_path), str(run.parent))}
    assert found.keys() == {"adapter", "peft", "pickled", "broken", "run"}  # not the checkpoints of the run
    assert (found["run"]["modules"], found["run"]["rank"], found["run"]["layers"]) == (14, 16, [0, 1])
    assert (found["peft"]["layout"], found["peft"]["kind"]) == ("peft", "lora")
    assert "pickle" in found["pickled"]["problem"]
    assert "is not valid safetensors" in found["broken"]["problem"]
    assert call(["adapters", "list", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert any("broken  cannot be used" in line for line in lines)


def test_show_says_what_it_is_and_how_strong(
    run: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = said_as_json(capsys, "show", str(run), "--model", str(tiny_llama))
    adapter = load_adapter(run)
    for path, strength in found["strengths"].items():
        a, b = adapter.tensors[f"{path}.lora_a"].astype(np.float64), adapter.tensors[f"{path}.lora_b"]
        np.testing.assert_allclose(strength, found["scale"] * np.linalg.norm(a @ b), rtol=1e-9)
    assert found["notes"] == []
    assert call(["adapters", "show", str(run)]) == 0
    assert "layers 0 to 1" in capsys.readouterr().out
    twin = write_llama(tmp_path / "twin", seed=1)
    assert call(["adapters", "show", str(run), "--model", str(twin)]) == InputRefused.exit_code


def test_diff_says_settings_and_distance(run: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = said_as_json(capsys, "diff", str(run), str(adapter))
    assert (same["same_tensors"], same["settings"], same["distance"]) == (True, {}, 0.0)
    loaded = load_adapter(adapter)
    turned = {n: -t if n.endswith("lora_b") else t for n, t in loaded.tensors.items()}
    save_adapter(adapter, turned, loaded.config)
    edit(adapter, mlxsft={**loaded.config["mlxsft"], "data": {"other.jsonl": "0" * 64}})
    other = said_as_json(capsys, "diff", str(run), str(adapter))
    np.testing.assert_allclose([other["distance"], other["similarity"]], [2.0, -1.0], rtol=1e-9)
    assert {name.partition(".")[0] for name in other["settings"]} == {"data"}
    assert call(["adapters", "diff", str(run), str(adapter)]) == 0
    assert "similarity -1.0000" in capsys.readouterr().out


def test_an_adapter_with_alpha_and_scale_says_which_counts(real: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["adapters", "show", str(real / "adapters" / "mlx-qwen2.5-0.5b-identity")]) == 0
    said = capsys.readouterr()
    assert "16 modules" not in said.out
    assert "8 modules" in said.out
    assert "scale      10" in said.out
    assert "alpha (16) beside scale (10.0)" in said.err
