"""A checkpoint folder is verified before a weight is read; each kind of bad one is refused in one clear line."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from mlxsft.errors import InputRefused, UsageError
from mlxsft.models.source import open_model

INDEX = "model.safetensors.index.json"
SHA = "0123456789abcdef0123456789abcdef01234567"
ROWS = 8
Change = Callable[[Path], object]


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def edit_json(path: Path, **changes: object) -> None:
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def matrix(rows: int = ROWS, width: int = 4) -> np.ndarray:
    return np.zeros((rows, width), np.float32)


def tokenizer_json(ids: int = ROWS, added: list[dict[str, Any]] | None = None, unigram: bool = False) -> dict[str, Any]:
    words = [f"w{i}" for i in range(ids)]
    vocab = [[word, -1.0] for word in words] if unigram else {word: i for i, word in enumerate(words)}
    return {"model": {"type": "Unigram" if unigram else "WordLevel", "vocab": vocab}, "added_tokens": added or []}


def write_checkpoint(folder: Path, tensors: dict[str, np.ndarray] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "llama", "vocab_size": ROWS, "eos_token_id": 2})
    write_json(folder / "tokenizer.json", tokenizer_json())
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
    default = {"model.embed_tokens.weight": matrix(), "model.norm.weight": np.ones(4, np.float32)}
    save_file(tensors or default, folder / "model.safetensors")
    return folder


def write_sharded(folder: Path) -> Path:
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    a, b = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    save_file({"model.embed_tokens.weight": matrix()}, folder / a)
    save_file({"model.norm.weight": np.ones(4, np.float32)}, folder / b)
    write_json(folder / INDEX, {"weight_map": {"model.embed_tokens.weight": a, "model.norm.weight": b}})
    return folder


def refusal(folder: Path | str, **options: Any) -> InputRefused:
    with pytest.raises(InputRefused) as caught:
        open_model(str(folder), **options)
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"{folder}: ")
    return caught.value


# ---- what is taken --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "rows", "tensors"),
    [
        ("stories260k-llama", 512, 47),
        ("tinystories-656k-llama", 2048, 20),
        ("tinystories-656k-llama-original", 2048, 20),
    ],
)
def test_real_checkpoints_are_taken(real: Path, name: str, rows: int, tensors: int) -> None:
    source = open_model(str(real / "models" / name))
    assert (source.embedding_rows, len(source.tensors), source.files) == (rows, tensors, ("model.safetensors",))
    assert source.config["model_type"] == "llama"
    assert source.end_token_ids() == {2}
    assert source.commit is None
    weights = (source.folder / "model.safetensors").read_bytes()
    assert source.hashes()["model.safetensors"] == hashlib.sha256(weights).hexdigest()


def test_a_folder_becomes_a_source(tmp_path: Path) -> None:
    source = open_model(str(write_checkpoint(tmp_path / "m")))
    assert source.folder == tmp_path / "m"
    assert source.name == str(tmp_path / "m")
    info = source.tensors["model.embed_tokens.weight"]
    assert (info.file, info.dtype, info.shape) == ("model.safetensors", "F32", (8, 4))
    assert source.embedding_rows == 8  # and the tokenizer has exactly 8 ids
    assert source.generation_config == {}
    assert set(source.hashes()) == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def test_hashes_change_with_every_file_that_defines_the_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tools.jinja", "merges.txt", "README.md", "x.py"):
        (folder / name).write_text("a")
    before = open_model(str(folder)).hashes()
    assert {"README.md", "x.py"}.isdisjoint(before)
    for name in before:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content + b" ")
        source_hashes = {n: hashlib.sha256((folder / n).read_bytes()).hexdigest() for n in before}
        (folder / name).write_bytes(content)
        assert {n for n in before if before[n] != source_hashes[n]} == {name}
    assert "additional_chat_templates/tools.jinja" in before


def test_shards_with_an_index_are_taken_in_order(tmp_path: Path) -> None:
    source = open_model(str(write_sharded(tmp_path)))
    assert source.files == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert source.tensors["model.norm.weight"].file == source.files[1]
    assert INDEX in source.hashes()


@pytest.mark.parametrize(
    "name",
    [
        "wte.weight",
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "transformer.word_embeddings.weight",
        "model.tok_embeddings.weight",
        "backbone.embeddings.weight",
        "model.embedding.weight",
        "language_model.model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_the_embedding_is_found_under_every_name(tmp_path: Path, name: str) -> None:
    others = {"h.0.position_embedding.weight": matrix(5), "lm_head.weight": matrix(16)}  # an untied, padded head
    assert open_model(str(write_checkpoint(tmp_path, {**others, name: matrix(9)}))).embedding_rows == 9


def test_the_text_embedding_counts_and_the_smallest_of_several(tmp_path: Path) -> None:
    text, vision = "language_model.model.embed_tokens.weight", "vision_tower.embed_tokens.weight"
    write_checkpoint(tmp_path, {text: matrix(9), vision: matrix(3)})
    assert open_model(str(tmp_path)).embedding_rows == 9
    write_checkpoint(tmp_path, {text: matrix(9), "decoy.embed_tokens.weight": matrix(99)})
    assert open_model(str(tmp_path)).embedding_rows == 9


def test_rows_come_from_the_config_where_no_tensor_tells(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"x.weight": matrix(3)})
    assert open_model(str(tmp_path)).embedding_rows == 8
    write_json(tmp_path / "config.json", {"model_type": "x", "text_config": {"vocab_size": 11}})
    assert open_model(str(tmp_path)).embedding_rows == 11
    write_json(tmp_path / "config.json", {"model_type": "x"})
    assert open_model(str(tmp_path)).embedding_rows is None


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2}, None, {2}),
        ({"eos_token_id": [1, 5]}, {"eos_token_id": 6}, {1, 5, 6}),
        ({"eos_token_id": None}, {"eos_token_id": [3]}, {3}),
        ({}, {}, set()),
        ({"text_config": {"eos_token_id": 4}}, None, {4}),
    ],
)
def test_end_tokens_of_both_configs(
    tmp_path: Path, config: dict[str, Any], generation: dict[str, Any] | None, expected: set[int]
) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "llama", **config})
    if generation is not None:
        write_json(tmp_path / "generation_config.json", generation)
    assert open_model(str(tmp_path)).end_token_ids() == expected


@pytest.mark.parametrize("value", ["2", [2, "x"], True, -1, {"id": 2}, 1.5])
def test_an_end_token_that_is_no_id_is_refused(tmp_path: Path, value: object) -> None:
    write_checkpoint(tmp_path)
    edit_json(tmp_path / "config.json", eos_token_id=value)
    assert "eos_token_id" in refusal(tmp_path).message


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 64}, 64),
        ({"n_positions": 32, "model_type": "gpt2"}, 32),
        ({"text_config": {"max_position_embeddings": 16}}, 16),
        ({"max_position_embeddings": 64, "sliding_window": 8, "model_type": "mistral"}, 8),
        ({"max_position_embeddings": 64, "sliding_window": None, "model_type": "mistral"}, 64),
        ({"max_position_embeddings": 64, "sliding_window": 8, "model_type": "gemma3_text"}, 64),
        ({"max_position_embeddings": 64, "sliding_window": 8, "use_sliding_window": False, "model_type": "qwen2"}, 64),
        ({"max_position_embeddings": True}, None),
        ({}, None),
    ],
)
def test_positions_are_what_the_model_takes(tmp_path: Path, config: dict[str, object], positions: int | None) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / "config.json"
    kept = {k: v for k, v in json.loads(path.read_text()).items() if k != "max_position_embeddings"}
    path.write_text(json.dumps({**kept, **config}))
    assert open_model(str(tmp_path)).positions == positions


def test_a_folder_is_found_as_written_and_under_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "org" / "name")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert open_model("~/org/name").folder == tmp_path / "org" / "name"
    monkeypatch.chdir(tmp_path / "org")
    assert open_model("name").folder.is_absolute()
    assert open_model("./name").folder == tmp_path / "org" / "name"


@pytest.mark.parametrize("model", ["./nothing", "/nothing/at/all", "~/nothing-of-this-name", "../nothing"])
def test_a_missing_folder_is_called_one(model: str) -> None:
    assert refusal(model).message.endswith("no such folder")


@pytest.mark.parametrize("model", ["", "a/b/c", "C:\\models\\x", "my model", "org/na..me", "org/name.git", "a" * 5000])
def test_what_is_neither_folder_nor_hub_id_is_told_so(model: str) -> None:
    message = refusal(model).message
    assert "neither a folder" in message
    assert "Hub id" in message


def test_a_file_is_not_a_checkpoint(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    assert "is a file" in refusal(folder / "model.safetensors").message


def test_a_revision_does_not_fit_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="revision") as caught:
        open_model(str(write_checkpoint(tmp_path)), revision="main")
    assert caught.value.exit_code == 2


# ---- code and pickle ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".BIN"])
def test_pickle_only_is_refused(tmp_path: Path, suffix: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / f"pytorch_model{suffix}")
    edit_json(folder / "config.json", auto_map={"AutoModel": "x.Y"}, model_type=None)
    message = refusal(folder).message
    assert "pickle only" in message
    assert f"pytorch_model{suffix}" in message


@pytest.mark.parametrize(
    ("file", "change", "key"),
    [
        ("config.json", {"auto_map": {"AutoModel": "modeling_x.X"}}, "auto_map"),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "modeling_x.X"}}}, "text_config.auto_map"),
        ("config.json", {"model_file": "model.py"}, "model_file"),
        ("config.json", {"custom_generate": "x"}, "custom_generate"),
        ("tokenizer_config.json", {"auto_map": ["tokenization_x.X", None]}, "auto_map"),
        ("generation_config.json", {"auto_map": {"x": "y"}}, "auto_map"),
        ("generation_config.json", {"custom_generate": "org/x"}, "custom_generate"),
        ("processor_config.json", {"auto_map": {"AutoProcessor": "p.P"}}, "auto_map"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "p.P"}}, "auto_map"),
    ],
)
def test_code_of_a_checkpoint_is_refused(tmp_path: Path, file: str, change: dict[str, Any], key: str) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "model.safetensors").write_bytes(b"broken too, but code comes first")
    content = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    write_json(folder / file, {**content, **change})
    caught = refusal(folder)
    assert f"{file}: `{key}`" in caught.message
    assert "never runs code" in str(caught.hint)


def test_an_empty_auto_map_asks_for_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    edit_json(folder / "config.json", auto_map={}, model_file=None)
    assert open_model(str(folder)).config["model_type"] == "llama"


# ---- files that are missing, malformed or outside --------------------------------------------------------------------


def deep(path: Path) -> None:
    path.write_text('{"a":' + "[" * 200_000)


REFUSED: dict[str, tuple[Change, str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "config is a folder": (
        lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()],
        "config.json is miss",
    ),
    "config not JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: is not JSON"),
    "config not UTF-8": (lambda f: (f / "config.json").write_bytes(b'{"a": "\xff"}'), "config.json: is not JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        "config.json: expected a JSON object, found list",
    ),
    "config too deep": (lambda f: deep(f / "config.json"), "config.json: nested too deeply"),
    "config huge number": (lambda f: (f / "config.json").write_text("9" * 5000), "config.json: is not JSON"),
    "config too large": (lambda f: (f / "config.json").write_bytes(b" " * (10 << 20) + b"{}"), "more than 10 MB"),
    "generation config": (lambda f: (f / "generation_config.json").write_text("nul"), "generation_config.json: is not"),
    "no model_type": (lambda f: write_json(f / "config.json", {}), "config.json: model_type is None"),
    "model_type 3": (lambda f: edit_json(f / "config.json", model_type=3), "config.json: model_type is 3"),
    "model_type a path": (lambda f: edit_json(f / "config.json", model_type="../../x"), "model_type is '../../x'"),
    "empty folder": (
        lambda f: [p.unlink() for p in f.iterdir()],
        "no weights: expected model*.safetensors, found noth",
    ),
    "gguf": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), "model.gguf"),
    "other name": (
        lambda f: (f / "model.safetensors").rename(f / "consolidated.safetensors"),
        "no weights of the name model*.safetensors, found consolidated.safetensors",
    ),
    "a shard alone": (
        lambda f: (f / "model.safetensors").rename(f / "model-00002-of-00003.safetensors"),
        "shards missing: 1 of 3",
    ),
    "two variants": (
        lambda f: (f / "model.fp16.safetensors").write_bytes((f / "model.safetensors").read_bytes()),
        "stored a second time",
    ),
    "no tensor": (lambda f: save_file({}, f / "model.safetensors"), "hold no tensor"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: is not valid safetens"),
    "no tokenizer": (
        lambda f: [(f / "tokenizer.json").unlink(), (f / "tokenizer_config.json").unlink()],
        "no tokenizer",
    ),
    "tokenizer.json": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: expected model.vocab"),
    "adapter inside": (
        lambda f: write_json(f / "adapter_config.json", {"base_model_name_or_path": "/elsewhere"}),
        "adapter_config.json: beside config.json",
    ),
    "vocab_file absolute": (
        lambda f: edit_json(f / "tokenizer_config.json", vocab_file="/etc/passwd"),
        "tokenizer_config.json: `vocab_file` is '/etc/passwd', which leaves",
    ),
    "vocab_file above": (lambda f: edit_json(f / "tokenizer_config.json", merges_file="a/../../m"), "`merges_file`"),
    "vocab_file Windows": (
        lambda f: edit_json(f / "tokenizer_config.json", tokenizer_file="C:\\x"),
        "`tokenizer_file`",
    ),
    "a list of files": (
        lambda f: edit_json(
            f / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "../tokenizer.9.json"]
        ),
        "`fast_tokenizer_files`",
    ),
    "nested file": (
        lambda f: edit_json(f / "tokenizer_config.json", sp_model_kwargs={"model_file": "~/x"}),
        "`sp_model_kwargs.model_file`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_folders_are_refused(tmp_path: Path, case: str) -> None:
    change, words = REFUSED[case]
    change(write_checkpoint(tmp_path))
    assert words in refusal(tmp_path).message


def weight_map(folder: Path, **changes: object) -> None:
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"].update(changes)
    write_json(folder / INDEX, content)


BAD_INDEX: dict[str, tuple[Change, str]] = {
    "shard gone": (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "shards missing"),
    "unlisted file": (
        lambda f: save_file({"x": matrix()}, f / "model-extra.safetensors"),
        "not in model.safetensors.index",
    ),
    "unlisted tensor": (
        lambda f: save_file({"model.norm.weight": matrix(), "x": matrix()}, f / "model-00002-of-00002.safetensors"),
        "model-00002-of-00002.safetensors: holds x, not listed",
    ),
    "tensors exchanged": (
        lambda f: weight_map(
            f,
            **{
                "model.norm.weight": "model-00001-of-00002.safetensors",
                "model.embed_tokens.weight": "model-00002-of-00002.safetensors",
            },
        ),
        "model.embed_tokens.weight should be in model-00002-of-00002.safetensors, but is in model-00001",
    ),
    "tensor nowhere": (lambda f: weight_map(f, y="model-00002-of-00002.safetensors"), "y should be in model-00002"),
    "stored twice": (
        lambda f: save_file(
            {"model.norm.weight": matrix(), "model.embed_tokens.weight": matrix()},
            f / "model-00002-of-00002.safetensors",
        ),
        "model.embed_tokens.weight stored a second time, first in model-00001-of-00002.safetensors",
    ),
    "above": (lambda f: weight_map(f, y="../model.safetensors"), "'../model.safetensors', which leaves the folder"),
    "absolute": (lambda f: weight_map(f, y="/x/model.safetensors"), "which leaves the folder"),
    "backslash": (lambda f: weight_map(f, y="..\\model.safetensors"), "which leaves the folder"),
    "subfolder": (lambda f: weight_map(f, y="a/model.safetensors"), "which leaves the folder"),
    "not a string": (lambda f: weight_map(f, y=3), "which leaves the folder"),
    "other name": (lambda f: weight_map(f, y="pytorch_model.safetensors"), "must be named model*.safetensors"),
    "not an object": (lambda f: write_json(f / INDEX, {"weight_map": []}), "expected weight_map"),
    "unreadable": (lambda f: (f / INDEX).write_text("?"), f"{INDEX}: is not JSON"),
}


@pytest.mark.parametrize("case", BAD_INDEX)
def test_an_index_that_does_not_match_is_refused(tmp_path: Path, case: str) -> None:
    change, words = BAD_INDEX[case]
    change(write_sharded(tmp_path))
    assert words in refusal(tmp_path).message


def test_all_shards_without_their_index_are_taken_and_one_less_is_not(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path)
    (folder / INDEX).unlink()
    assert len(open_model(str(folder)).files) == 2
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "shards missing: 1 of 2" in refusal(folder).message


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_git_lfs_pointer_gets_the_command(tmp_path: Path, file: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    caught = refusal(tmp_path)
    assert f"{file}: is not" in caught.message
    assert "git lfs pull" in str(caught.hint)


def test_an_authors_own_path_that_is_never_opened_does_no_harm(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    edit_json(tmp_path / "tokenizer_config.json", special_tokens_map_file="/home/me/map.json", vocab_file="vocab.json")
    assert open_model(str(tmp_path)).embedding_rows == 8


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(tmp_path: Path, file: str) -> None:
    folder = write_checkpoint(tmp_path / "m")
    (folder / file).touch()
    (folder / file).rename(folder / "stored")
    (folder / file).symlink_to("stored")
    open_model(str(folder))
    (folder / "stored").rename(tmp_path / "stored")
    (folder / file).unlink()
    (folder / file).symlink_to(tmp_path / "stored")
    assert f"{file}: a link that leaves the folder" in refusal(folder).message


def test_a_dangling_link_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "merges.txt").symlink_to("nowhere")
    assert "merges.txt: a link to nothing" in refusal(folder).message


def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    os.mkfifo(folder / "generation_config.json")
    assert "generation_config.json: not a regular file" in refusal(folder).message


def snapshot(tmp_path: Path) -> Path:
    """The Hub cache's layout: blobs by hash, snapshots of links."""
    made, repo = write_checkpoint(tmp_path / "made"), tmp_path / "models--org--name"
    folder = repo / "snapshots" / SHA
    folder.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for file in made.iterdir():
        data = file.read_bytes()
        lfs = file.suffix == ".safetensors"
        blob = hashlib.sha256(data).hexdigest() if lfs else hashlib.sha1(data).hexdigest()
        (repo / "blobs" / blob).write_bytes(data)
        (folder / file.name).symlink_to(f"../../blobs/{blob}")
    return folder


def test_a_hub_snapshot_of_links_is_taken_and_lfs_blobs_are_not_read_for_their_hash(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    source = open_model(str(folder))
    assert source.commit == SHA
    assert open_model(str(folder), revision=SHA).commit == SHA
    expected = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    assert source.hashes() == expected
    (folder / "model.safetensors").resolve().write_bytes(b"changed: the name is believed")
    assert source.hashes() == expected


def test_a_link_out_of_a_hub_snapshot_is_refused(tmp_path: Path) -> None:
    folder = snapshot(tmp_path)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(tmp_path / "made" / "config.json")
    assert "config.json: a link that leaves" in refusal(folder).message


# ---- token ids ------------------------------------------------------------------------------------------------------


def token(index: object, content: object = "<new>") -> dict[str, Any]:
    return {"id": index, "content": content}


BEYOND: dict[str, tuple[Change, str]] = {
    "vocabulary": (
        lambda f: write_json(f / "tokenizer.json", tokenizer_json(9)),
        "'w8' has the id 8, but the embedding",
    ),
    "unigram": (lambda f: write_json(f / "tokenizer.json", tokenizer_json(9, unigram=True)), "'w8' has the id 8"),
    "added": (lambda f: write_json(f / "tokenizer.json", tokenizer_json(7, [token(8)])), "'<new>' has the id 8"),
    "added, id falsely low": (
        lambda f: write_json(f / "tokenizer.json", tokenizer_json(8, [token(1)])),
        "tokenizer.json: the token '<new>' has the id 8",
    ),
    "negative": (lambda f: write_json(f / "tokenizer.json", tokenizer_json(2, [token(-1)])), "has the id -1"),
    "no number": (
        lambda f: write_json(f / "tokenizer.json", tokenizer_json(2, [token("5")])),
        "the id '5', expected a",
    ),
    "decoder": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"8": {"content": "<x>"}}),
        "tokenizer_config.json: the token '<x>' has the id 8, but the embedding has 8 rows",
    ),
    "decoder no number": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"²": {"content": "<x>"}}),
        "has the id '²', expected a number",
    ),
    "added_tokens.json": (
        lambda f: write_json(f / "added_tokens.json", {"<x>": 9}),
        "added_tokens.json: the token '<x>'",
    ),
    "vocab.json": (
        lambda f: [(f / "tokenizer.json").unlink(), write_json(f / "vocab.json", {"a": 0, "b": 8})],
        "vocab.json: the token 'b' has the id 8",
    ),
    "image token further": (
        lambda f: edit_json(f / "tokenizer_config.json", added_tokens_decoder={"9": {"content": "<image_soft_token>"}}),
        "has the id 9",
    ),
    "other token there": (
        lambda f: write_json(f / "tokenizer.json", tokenizer_json(8, [token(8, "<image_token>")])),
        "has the id 8",
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_token_id_without_a_row_is_refused(tmp_path: Path, case: str) -> None:
    change, words = BEYOND[case]
    change(write_checkpoint(tmp_path))
    assert words in refusal(tmp_path).message


def test_the_image_token_of_gemma_3_one_past_the_end_is_taken(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    added = [token(8, "<image_soft_token>")]
    write_json(tmp_path / "tokenizer.json", tokenizer_json(8, added))
    edit_json(tmp_path / "tokenizer_config.json", added_tokens_decoder={"8": {"content": "<image_soft_token>"}})
    assert open_model(str(tmp_path)).embedding_rows == 8


@pytest.mark.parametrize("declared", [[2, 3], [1, 1], [5, 4]])
def test_ids_are_counted_as_the_tokenizers_library_numbers_them(tmp_path: Path, declared: list[int]) -> None:
    write_checkpoint(tmp_path)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{**token(index, f"<{i}>"), **flags} for i, index in enumerate(declared)]
    content = {"version": "1.0", **tokenizer_json(6, added)}
    content["model"]["unk_token"] = "w0"
    write_json(tmp_path / "tokenizer.json", content)
    largest = max(Tokenizer.from_file(str(tmp_path / "tokenizer.json")).get_vocab().values())
    for rows, fits in ((largest + 1, True), (largest, False)):
        save_file({"model.embed_tokens.weight": matrix(rows)}, tmp_path / "model.safetensors")
        if fits:
            open_model(str(tmp_path))
        else:
            assert f"has the id {largest}" in refusal(tmp_path).message


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"time_step_limit": [0.0, float("inf")]},  # Mamba's
        {"num_key_value_heads": None, "head_dim": None, "rope_theta": None},
        {"intermediate_size": [64, 128], "num_key_value_heads": [2, None]},  # one for each layer
        {"intermediate_size": 0, "head_dim": 0},
        {"num_hidden_layers": 2, "max_window_layers": 28, "num_nextn_predict_layers": 0},
        {"max_position_embeddings": 1 << 40, "sliding_window": 1 << 33, "attn_implementation": "sdpa"},
        {"vision_config": {"num_hidden_layers": 400, "image_size": 8192}},
        {"rms_norm_eps": 1e-300, "rope_theta": 10_000},
    ],
)
def test_sizes_that_published_models_have_are_taken(tmp_path: Path, config: dict[str, Any]) -> None:
    edit_json(write_checkpoint(tmp_path) / "config.json", **config)
    assert open_model(str(tmp_path)).embedding_rows == 8


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", INDEX])
def test_a_key_that_stands_twice_is_refused(tmp_path: Path, file: str) -> None:
    path = write_sharded(tmp_path) / file
    path.write_text('{"model_type": "x", "model_type": "llama", ' + path.read_text()[1:])
    assert f"{file}: is not JSON (model_type stands in it twice)" in refusal(tmp_path).message
