"""Tokenizers are those that transformers loads by itself, though less is imported for them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mlxsft.data.tokenizer import Tokenizer
from mlxsft.errors import InputRefused
from mlxsft.models.source import ModelSource

CLASSES = ("PreTrainedTokenizerFast", "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "phi3", "gpt2", "deepseek_v3", "new"])
@pytest.mark.parametrize("named", [*CLASSES, "GemmaTokenizer", "TokenizersBackend", "NoSuchTokenizer", None])
def test_the_tokenizer_is_the_one_of_transformers(
    tiny_llama: Path, tmp_path: Path, model_type: str, named: str | None
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    for file, key, value in (("config", "model_type", model_type), ("tokenizer_config", "tokenizer_class", named)):
        path = folder / f"{file}.json"
        content = json.loads(path.read_text()) | {key: value}
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    assert told(folder) == told_by_transformers(folder)


@pytest.mark.parametrize("name", ["smollm", "qwen2.5", "qwen3"])
def test_a_real_tokenizer_is_the_one_of_transformers(real: Path, tiny_llama: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(real / "tokenizers" / name, folder)
    model_type = {"smollm": "llama", "qwen2.5": "qwen2", "qwen3": "qwen3"}[name]
    config = json.loads((tiny_llama / "config.json").read_text()) | {"model_type": model_type}
    (folder / "config.json").write_text(json.dumps(config))
    assert told(folder) == told_by_transformers(folder)
    assert len(str(told(folder))) == 64  # a hash, and no refusal


def told(folder: Path) -> str | None:
    config = json.loads((folder / "config.json").read_text())
    try:
        return Tokenizer.load(ModelSource(folder, "model", None, config, {}, {}, None, ())).fingerprint
    except InputRefused as refusal:
        return refusal.message


def told_by_transformers(folder: Path) -> str | None:
    try:
        tokenizer = Tokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        tokenizer.refuse_malformed()
        return tokenizer.fingerprint
    except Exception as error:  # whatever it is, the words are to be the same
        return f"model: the tokenizer cannot be loaded: {str(error).splitlines()[0]}"
