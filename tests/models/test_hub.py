"""Checkpoints from the Hub: huggingface_hub itself downloads from a small Hub of ours on this machine.

Each opening runs in a process of its own, because huggingface_hub reads its environment once, at import.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from tests.hub import FIRST, SECOND, Hub, environment

CHILD = """
import json, sys
from mlxsft.errors import MlxsftError
from mlxsft.models.source import open_model
lines = []
try:
    source = open_model(sys.argv[1], revision=sys.argv[2] or None, progress=lines.append)
    answer = {"exit": 0, "folder": str(source.folder), "name": source.name, "commit": source.commit,
              "rows": source.embedding_rows, "files": source.files, "hashes": source.hashes()}
except MlxsftError as error:
    answer = {"exit": error.exit_code, "message": error.message, "hint": error.hint}
print(json.dumps({**answer, "progress": lines}))
"""


def checkpoint(fill: float = 0.0, **config: object) -> dict[str, bytes]:
    """The files of a repository that can be opened, and some that must never be asked for."""
    vocab = {f"w{i}": i for i in range(8)}
    tokenizer = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": []}
    content = {"model_type": "llama", "eos_token_id": 2, **config}
    return {
        "config.json": json.dumps(content).encode(),
        "tokenizer.json": json.dumps(tokenizer).encode(),
        "additional_chat_templates/tools.jinja": b"{{ messages }}",
        "model.safetensors": save({"model.embed_tokens.weight": np.full((8, 4), fill, np.float32)}),
        "modeling_x.py": b"raise SystemExit('code ran')",
        "pytorch_model.bin": b"pickle",
        "README.md": b"words",
        "onnx/model.onnx": b"large",
    }


@pytest.fixture
def hub(hub: Hub) -> Hub:
    hub.repos["org/name"] = {FIRST: checkpoint()}
    return hub


@pytest.fixture
def opened(tmp_path: Path, hub: Hub) -> Any:
    """`opened(model, revision, HF_HUB_OFFLINE="1", ...)`: what a process with that environment says."""

    def run(model: str = "org/name", revision: str = "", **settings: str) -> dict[str, Any]:
        child = subprocess.run(
            [sys.executable, "-c", CHILD, model, revision],
            env={**environment(hub, tmp_path / "hf"), **settings},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert child.returncode == 0, child.stderr
        answer: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
        assert "\n" not in answer.get("message", "")
        return answer

    return run


def test_a_download_is_pinned_to_its_commit_and_then_found_offline(hub: Hub, opened: Any) -> None:
    answer = opened()
    assert (answer["exit"], answer["commit"], answer["rows"]) == (0, FIRST, 8), answer
    assert answer["folder"].endswith(f"snapshots/{FIRST}")
    assert answer["files"] == ["model.safetensors"]
    files = checkpoint()
    wanted = {"config.json", "tokenizer.json", "additional_chat_templates/tools.jinja", "model.safetensors"}
    assert answer["hashes"] == {name: hashlib.sha256(files[name]).hexdigest() for name in wanted}
    assert {p.name for p in Path(answer["folder"]).iterdir()} == {name.split("/")[0] for name in wanted}
    assert not any(hub.asked_for(word) for word in (".py", ".bin", "README", "onnx"))
    weights = next(i for i, (_, path, _) in enumerate(hub.log) if path.endswith("model.safetensors"))
    config = next(i for i, (_, path, _) in enumerate(hub.log) if path.endswith("config.json"))
    assert config < weights
    assert all(f"/resolve/{FIRST}/" in path for path in hub.asked_for("model.safetensors"))

    before = len(hub.log)
    offline = opened(HF_HUB_OFFLINE="1")
    assert len(hub.log) == before
    assert {**offline, "progress": []} == {**answer, "progress": []}
    assert "HF_HUB_OFFLINE is set" in offline["progress"][0]
    assert "using the cached commit" in offline["progress"][0]


def test_what_is_cached_is_not_downloaded_again(hub: Hub, opened: Any) -> None:
    assert "downloading" in opened()["progress"][-1]
    hub.log.clear()
    assert opened()["progress"] == []
    assert hub.asked_for("resolve") == []


def test_a_branch_moves_and_a_pinned_commit_does_not(hub: Hub, opened: Any) -> None:
    first = opened()
    hub.repos["org/name"][SECOND] = checkpoint(fill=1.0)
    second = opened()
    assert (first["commit"], second["commit"]) == (FIRST, SECOND)
    assert first["hashes"]["model.safetensors"] != second["hashes"]["model.safetensors"]
    assert opened(HF_HUB_OFFLINE="1")["commit"] == SECOND
    hub.log.clear()
    assert opened(revision=FIRST)["hashes"] == first["hashes"]
    assert hub.log == []  # a commit never changes: no question to the Hub
    assert opened(revision="main")["commit"] == SECOND


def test_a_download_that_broke_off_leaves_the_older_commit_usable(hub: Hub, opened: Any) -> None:
    opened()
    broken = checkpoint(fill=1.0)
    broken["model.safetensors"] = b"malformed"
    hub.repos["org/name"][SECOND] = broken
    assert opened()["exit"] == 3
    assert opened(HF_HUB_OFFLINE="1")["commit"] == FIRST


def test_shards_come_by_their_index(hub: Hub, opened: Any) -> None:
    files = checkpoint()
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    files[a] = files.pop("model.safetensors")
    files[b] = save({"model.norm.weight": np.ones(4, np.float32)})
    weight_map = {"model.embed_tokens.weight": a, "model.norm.weight": b}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    hub.repos["org/name"][FIRST] = files
    assert opened()["files"] == [a, b]
    del hub.repos["org/name"][FIRST][b]
    hub.repos["org/name"][SECOND] = hub.repos["org/name"].pop(FIRST)
    hub.log.clear()
    answer = opened()
    assert answer["exit"] == 3
    assert f"shards missing: model.safetensors.index.json names {b}" in answer["message"]
    assert hub.asked_for(".safetensors") == hub.asked_for("index.json")


def test_pickle_only_is_refused_before_anything_is_downloaded(hub: Hub, opened: Any) -> None:
    del hub.repos["org/name"][FIRST]["model.safetensors"]
    answer = opened()
    assert answer["exit"] == 3
    assert "org/name: the weights are stored as pickle only (pytorch_model.bin)" in answer["message"]
    assert hub.asked_for("resolve") == []


def test_no_config_is_refused_before_anything_is_downloaded(hub: Hub, opened: Any) -> None:
    del hub.repos["org/name"][FIRST]["config.json"]
    answer = opened()
    assert (answer["exit"], answer["message"]) == (3, "org/name: config.json is missing")
    assert hub.asked_for("resolve") == []


def test_code_is_refused_before_the_weights(hub: Hub, opened: Any) -> None:
    hub.repos["org/name"][FIRST] = checkpoint(auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    answer = opened()
    assert answer["exit"] == 3
    assert "config.json: `auto_map`" in answer["message"]
    assert hub.asked_for("config.json")
    assert hub.asked_for("safetensors") == []
    assert hub.asked_for(".py") == []


def test_names_from_a_listing_stay_inside_the_cache(hub: Hub, opened: Any, tmp_path: Path) -> None:
    evil = {"additional_chat_templates/../../../../evil.jinja": b"x", "../tokenizer.model": b"x"}
    hub.repos["org/name"][FIRST] = {**checkpoint(), **evil}
    assert opened()["exit"] == 0
    assert not list(tmp_path.rglob("evil*"))
    assert not list(tmp_path.rglob("tokenizer.model"))


@pytest.mark.parametrize(
    ("model", "revision", "words", "hint"),
    [
        ("org/other", "", "org/other: neither a folder here nor a repository on the Hub", "hf auth login"),
        ("org/name", "v9", "org/name: the Hub has no revision 'v9'", "branch, tag or commit"),
        ("org/name", "3" * 40, f"org/name: the Hub has no revision '{'3' * 40}'", "branch, tag or commit"),
    ],
)
def test_what_is_not_on_the_hub(opened: Any, model: str, revision: str, words: str, hint: str) -> None:
    answer = opened(model, revision)
    assert answer["exit"] == 7
    assert answer["message"].startswith(words)
    assert hint in answer["hint"]


def test_a_revision_that_is_a_path_is_refused(hub: Hub, opened: Any) -> None:
    assert opened(revision="../../x")["exit"] == 2
    assert hub.log == []


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "nor a repository on the Hub that this login may see"), (403, "the Hub refuses access"), (503, "503")],
)
def test_a_hub_that_refuses(hub: Hub, opened: Any, status: int, words: str) -> None:
    hub.status = status
    answer = opened()
    assert answer["exit"] == 7
    assert words in answer["message"]
    assert "hf auth login" in answer["hint"] or status == 503


def test_a_gate_closes_between_listing_and_download(hub: Hub, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The listing of a gated repository is public, its files are not."""
    open_answer = hub.answer

    def gated(method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        return (403, {"X-Error-Code": "GatedRepo"}, b"") if "/resolve/" in path else open_answer(method, path)

    monkeypatch.setattr(hub, "answer", gated)
    answer = opened()
    assert (answer["exit"], answer["message"]) == (7, "org/name: the Hub refuses access")


def test_a_hub_that_is_down_leaves_the_cache(hub: Hub, opened: Any) -> None:
    opened()
    hub.status = 503
    answer = opened()
    assert answer["commit"] == FIRST
    assert "using the cached commit" in answer["progress"][0]


def test_a_page_that_is_no_hub(hub: Hub, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "answer", lambda method, path: (200, {}, b"<html>log in to the hotel's network</html>"))
    answer = opened()
    assert answer["exit"] == 7
    assert "the Hub cannot be asked for it" in answer["message"]


def test_no_network(hub: Hub, opened: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, but nobody listens
        answer = opened(HF_ENDPOINT=dead)
        assert answer["exit"] == 7
        assert "org/name: no such folder here, and the Hub cannot be asked for it (ConnectError" in answer["message"]
        assert "no complete copy" in answer["message"]
        opened()
        assert opened(HF_ENDPOINT=dead)["commit"] == FIRST


def test_offline_with_an_incomplete_copy(hub: Hub, opened: Any) -> None:
    answer = opened(HF_HUB_OFFLINE="1")
    assert answer["exit"] == 7
    assert "HF_HUB_OFFLINE is set" in answer["message"]
    folder = Path(opened()["folder"])
    (folder / "model.safetensors").unlink()
    answer = opened(HF_HUB_OFFLINE="1")
    assert answer["exit"] == 7
    assert "org/name" in answer["message"]
    assert opened()["exit"] == 0  # online it is completed


def test_the_token_is_sent(hub: Hub, opened: Any) -> None:
    opened()
    assert {token for _, _, token in hub.log} == {None}
    hub.log.clear()
    hub.repos["org/name"][SECOND] = checkpoint(fill=1.0)
    opened(HF_TOKEN="hf_secret")
    assert {token for _, _, token in hub.log} == {"Bearer hf_secret"}
