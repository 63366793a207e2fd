"""What an adapter says about itself, under `mlxsft` in its config, and whether that is the base at hand.

    base       name, commit, SHA-256 of every file that defines it, model_type, quantization, whether its head is tied
    tokenizer  SHA-256 over its files                 template   name, text, SHA-256
    data       {file: SHA-256}                        recipe     every setting of the run       versions   of what ran
An adapter from elsewhere has none of it, one from an older mlxsft some: what is not there cannot be checked, and is
said.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlxsft.errors import InputRefused
from mlxsft.models.adapter import Adapter, load_adapter
from mlxsft.models.base_modules import is_tied
from mlxsft.models.checks import BESIDE, TOKENIZERS
from mlxsft.models.source import ModelSource

KEY = "mlxsft"
BESIDE_TOKENIZER = tuple(name for name in BESIDE if name != "hf_quant_config.json")


def base_facts(source: ModelSource, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The parts of a passport that the base decides; `hashes` are those of `source`."""
    quantization = source.config.get("quantization") or source.config.get("quantization_config")
    return {
        "base": {
            "name": without_folders(source.name),
            "commit": source.commit,
            "sha256": dict(hashes),
            "model_type": source.config.get("model_type"),
            "quantization": quantization,
            "tied": is_tied(source),
        },
        "tokenizer": {"sha256": tokenizer_hash(hashes)},
    }


def tokenizer_hash(hashes: Mapping[str, str]) -> str:
    """SHA-256 over names and hashes of the files that turn text into tokens, of {file: SHA-256}."""
    patterns = (*TOKENIZERS, *BESIDE_TOKENIZER)
    names = sorted(name for name in hashes if any(fnmatchcase(name, pattern) for pattern in patterns))
    return hashlib.sha256("".join(f"{name} {hashes[name]}\n" for name in names).encode()).hexdigest()


def without_folders(value: Any) -> Any:
    """A JSON value in which absolute paths, which say something about a person's machine, are plain names."""
    if isinstance(value, Mapping):
        return {name: without_folders(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_folders(inner) for inner in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def passport_part(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of the passport in an adapter's config, empty where it has none."""
    passport = config.get(KEY)
    part = passport.get(name) if isinstance(passport, dict) else None
    return part if isinstance(part, dict) else {}


def load_adapter_for(source: ModelSource, folder: Path) -> tuple[Adapter, list[str]]:
    """The adapter in `folder`, and a sentence for whatever could not be checked.

    Raises InputRefused as `load_adapter` does, and where the passport names other weights or another tokenizer.
    """
    adapter = load_adapter(folder)
    return adapter, check_base(adapter.config, source, folder)


def check_base(config: Mapping[str, Any], source: ModelSource, folder: Path) -> list[str]:
    """A sentence for whatever the passport in `config` does not tell. Raises InputRefused where it is another base."""
    base, unknown = passport_part(config, "base"), []
    known = base.get("sha256")
    trained_on = (
        {str(h) for file, h in known.items() if str(file).endswith(".safetensors")}
        if isinstance(known, dict)
        else set()
    )
    if not trained_on:
        unknown.append("weights")
    elif trained_on != {source.hash_of(file) for file in source.files}:
        raise InputRefused(
            f"{folder}: this adapter was trained on other weights ({base.get('name')}) than those of {source.name}",
            "Give the model that it was trained on.",
        )
    tokenizer = passport_part(config, "tokenizer").get("sha256")
    if tokenizer is None:
        unknown.append("tokenizer")
    elif tokenizer != tokenizer_hash(source.hashes()):
        raise InputRefused(
            f"{folder}: this adapter was trained with another tokenizer than that of {source.name}",
            "Give the model with the tokenizer files that it was trained with.",
        )
    if not unknown:
        return []
    has = "its passport does not say" if passport_part(config, "base") else "it has no passport of mlxsft's to say"
    return [
        f"{folder}: {has} which {' and '.join(unknown)} this adapter was trained on; only names and shapes are checked"
    ]
