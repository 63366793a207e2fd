"""`mlxsft convert`, `quantize`, `pull` and `verify`: what they print, what they return, and what is on the disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlxsft.cli import call
from tests.hub import FIRST, SECOND, Hub, environment

CARD = b"---\nlicense: mit\n---\n"


def test_convert_says_before_and_after(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(["convert", str(tiny_llama), str(out), "--bits", "4", "--group-size", "32"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith(f"{out}: ")
    assert " before, " in said.out
    assert " after in 1 file, " in said.out
    assert "bits per weight" in said.out
    assert said.err == ""
    assert call(["verify", str(out)]) == 0
    assert call(["convert", str(tiny_llama), str(out)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_json(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mlx, out = tmp_path / "mlx", tmp_path / "out"
    assert call(["convert", str(tiny_llama), str(mlx), "--dtype", "bfloat16", "--json"]) == 0
    dense = json.loads(capsys.readouterr().out)
    assert dense["quantization"] is None
    assert dense["bits_per_weight"] == 16
    command = ["quantize", str(mlx), str(out), "--group-size", "32", "--bits-for", "embed_tokens=8,down_proj=16"]
    assert call([*command, "--max-shard-size", "20kB", "--json"]) == 0
    packed = json.loads(capsys.readouterr().out)
    assert packed["before_bytes"] == dense["after_bytes"]
    assert packed["parameters"] == dense["parameters"]
    assert 4.5 < packed["bits_per_weight"] < 16
    assert packed["shards"] > 1
    config = json.loads((out / "config.json").read_text())
    assert config["quantization"] == packed["quantization"] == config["quantization_config"]
    assert config["quantization"]["model.embed_tokens"] == {"group_size": 32, "bits": 8, "mode": "affine"}
    assert call(["generate", str(out), "Who are you?", "--max-tokens", "2", "--backend", "mlx"]) == 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bits", "4", "--mixed", "mixed_3_6"], 2, "--bits 4 and --mixed mixed_3_6 at once"),
        (["--mode", "mxfp4", "--bits", "8"], 2, "--bits 8: mxfp4 has 4"),
        (["--bits-for", "attention=8"], 2, "nothing to quantize is named attention"),
        (["--bits-for", "lm_head=8", "--group-size", "32"], 2, "A tied head has no matrix of its own"),
        (["--dequantize"], 2, "is not quantized"),
        (["--max-shard-size", "big"], 2, "expected a size such as 5GB"),
        (["--quantize", "--group-size", "128"], 3, "nothing to quantize"),
        (["--bits", "7"], 2, "'7' is not one of"),
    ],
)
def test_what_is_refused_leaves_nothing(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, words: str
) -> None:
    assert call(["convert", str(tiny_llama), str(tmp_path / "out"), *options]) == code
    assert words in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_divide_is_said(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["convert", str(tiny_llama), str(tmp_path / "out"), "--quantize"]) == 0
    assert "stay as they are, their rows do not divide into groups of 64" in capsys.readouterr().err


def test_verify_names_what_differs(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert call(["convert", str(tiny_llama), str(out)]) == 0
    (out / "config.json").write_text("{}")
    (out / "tokenizer.json").unlink()
    (out / "evil\x1b[31m.py").write_text("")
    capsys.readouterr()
    assert call(["verify", str(out)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("changed  config.json: 2 bytes")
    assert lines[1:] == ["missing  tokenizer.json", "added    evil\\x1b[31m.py"]
    assert call(["verify", str(out), "--json"]) == 3
    found = json.loads(capsys.readouterr().out)
    assert (list(found["changed"]), found["missing"]) == (["config.json"], ["tokenizer.json"])
    assert call(["verify", str(tiny_llama)]) == 3
    assert "has no lock.json" in capsys.readouterr().err
    assert call(["verify", str(tmp_path / "nowhere")]) == 3
    assert "no such folder" in capsys.readouterr().err


# ---- the Hub: in processes of their own, because huggingface_hub reads its environment once --------------------------


@pytest.fixture
def hub(hub: Hub, tiny_llama: Path) -> Hub:
    files = {file.name: file.read_bytes() for file in tiny_llama.iterdir()}
    hub.repos["org/name"] = {FIRST: files | {"README.md": CARD, "modeling.py": b"raise SystemExit('code ran')"}}
    hub.repos["org/name"][SECOND] = hub.repos["org/name"][FIRST] | {"generation_config.json": b"{}"}
    return hub


COMMANDS = """
import json, sys
from mlxsft.cli import call
for line in json.loads(sys.argv[1]):
    print("exit", call(line), flush=True)
"""


def mlxsft(hub: Hub, home: Path, *commands: list[str], **settings: str) -> tuple[list[int], str, str]:
    """(exit codes, stdout, stderr) of commands that know this Hub."""
    ran = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps([[str(word) for word in words] for words in commands])],
        env={**environment(hub, home), **settings},
        cwd=home.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ran.stdout.splitlines()
    codes = [int(line.removeprefix("exit ")) for line in lines if line.startswith("exit ")]
    assert len(codes) == len(commands), ran.stderr
    return codes, "\n".join(line for line in lines if not line.startswith("exit ")), ran.stderr


def test_pull_convert_and_verify(hub: Hub, tmp_path: Path) -> None:
    home, copy, out = tmp_path / "hf", tmp_path / "copy", tmp_path / "out"
    codes, said, _ = mlxsft(
        hub,
        home,
        ["pull", "org/name", "--revision", FIRST, "--json"],
        ["verify", "org/name", "--revision", FIRST],
        ["pull", "org/name", str(copy), "--revision", FIRST],
        ["pull", "org/name", str(copy), "--revision", FIRST],
        ["verify", str(copy)],
        ["convert", "org/name", str(out), "--revision", FIRST, "--bits", "8", "--group-size", "32"],
        ["convert", str(copy), str(tmp_path / "again"), "--bits", "8", "--group-size", "32"],
    )
    assert codes == [0, 0, 0, 2, 0, 0, 0]
    pulled: dict[str, Any] = json.loads(said.splitlines()[0])
    assert (pulled["repository"], pulled["commit"]) == ("org/name", FIRST)
    assert hub.asked_for("modeling.py") == []
    lock = json.loads((copy / "lock.json").read_text())
    assert (lock["repository"], lock["commit"]) == ("org/name", FIRST)
    assert sorted(lock["files"]) == sorted(p.name for p in copy.iterdir() if p.name != "lock.json")
    assert not (Path(pulled["folder"]) / "lock.json").exists()  # the Hub's cache is not ours
    for folder in (out, tmp_path / "again"):  # from the Hub, and from the pulled folder, which remembers
        card = (folder / "README.md").read_text()
        assert "base_model: org/name\nbase_model_relation: quantized" in card
        assert "license: mit" in card
        assert f"Made from org/name at commit {FIRST}" in card
        assert f"mlxsft convert org/name {folder.name} --quantize --bits 8 --group-size 32 --revision {FIRST}" in card
        made = json.loads((folder / "lock.json").read_text())
        assert (made["repository"], made["commit"]) == ("org/name", FIRST)
    weights = Path(pulled["folder"]) / "model.safetensors"
    blob = weights.resolve()
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    codes, said, errors = mlxsft(
        hub, home, ["verify", "org/name", "--revision", FIRST], ["pull", "org/name", "--revision", FIRST]
    )
    assert codes == [3, 3]
    assert said.startswith("changed  model.safetensors: SHA-256")
    assert "in the Hub's cache is not what the Hub has" in errors


def test_pull_takes_a_hub_id_and_offline_says_so(hub: Hub, tmp_path: Path, tiny_llama: Path) -> None:
    home = tmp_path / "hf"
    codes, _, errors = mlxsft(hub, home, ["pull", str(tiny_llama)], ["pull", "org/none"], ["verify", "org/name"])
    assert codes == [2, 7, 3]
    assert "pull takes the id of a model on the Hub" in errors
    codes, _, errors = mlxsft(hub, home, ["pull", "org/name"], HF_HUB_OFFLINE="1")
    assert codes == [7]
    assert "HF_HUB_OFFLINE is set" in errors
