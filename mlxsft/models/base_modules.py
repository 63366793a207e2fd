"""The matrices of a checkpoint that an adapter can be put beside, told from its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlxsft.models.checks import EMBEDDINGS, OTHER_MODALITIES
from mlxsft.models.names import NESTED, TURNED, mlx_name
from mlxsft.models.source import ModelSource

NOT_TEXT = re.compile(rf"{OTHER_MODALITIES.pattern}|multi_modal")


@dataclass(frozen=True)
class Matrix:
    """A linear module, [outputs, inputs], or an embedding, [tokens, width]."""

    rows: int
    columns: int


def base_matrices(source: ModelSource) -> dict[str, Matrix]:
    """{mlx-lm's path: size} of every matrix, as many columns as before where it is quantized.

    Experts, and what is not of the text model, are left out.
    """
    kind = str(source.config.get("model_type"))
    found = {}
    for name, info in source.tensors.items():
        path = name.removesuffix(".weight")
        if path == name or len(info.shape) != 2 or ".experts." in path or NOT_TEXT.search(path):
            continue
        rows, columns = unpacked_shape(source, name)
        if kind == "gpt2" and not path.startswith(("model.", "transformer.", "lm_head")):
            path = f"transformer.{path}"  # as OpenAI published it
        if kind == "gpt2" and TURNED.search(name) and not path.startswith("model."):
            rows, columns = columns, rows
        path = mlx_name(kind, path)
        if kind in NESTED and not path.startswith("language_model."):  # as transformers 4 named it
            path = f"language_model.{path}"
        found[path] = Matrix(rows, columns)
    if is_tied(source):
        found = {path: matrix for path, matrix in found.items() if not path.endswith("lm_head")}
    return found


def unpacked_shape(source: ModelSource, name: str) -> tuple[int, ...]:
    """The shape of a weight, with as many columns as before where it is quantized."""
    shape, path = source.tensors[name].shape, name.removesuffix(".weight")
    if (scales := source.tensors.get(f"{path}.scales")) is not None:
        return *shape[:-1], scales.shape[-1] * _group_size(source.config, path)
    return shape


def is_tied(source: ModelSource) -> bool:
    """Whether the embedding is the output head too."""
    config = source.config.get("text_config")
    said = source.config.get(
        "tie_word_embeddings", config.get("tie_word_embeddings") if isinstance(config, dict) else None
    )
    has_head = any(name.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for name in source.tensors)
    return bool(said) or (said is None and not has_head)


def is_embedding(path: str) -> bool:
    """Whether a module of this path turns tokens (or positions) into vectors."""
    return path.rpartition(".")[2] in {*EMBEDDINGS, "wpe"} - {"lm_head"}


def is_token_embedding(path: str) -> bool:
    """Whether a module of this path turns tokens into vectors."""
    return is_embedding(path) and not path.endswith("wpe")


def _group_size(config: Mapping[str, Any], path: str) -> int:
    block = config.get("quantization") or config.get("quantization_config") or {}
    own = block.get(path) if isinstance(block, dict) else None
    size = (own if isinstance(own, dict) else block).get("group_size", 64)
    return size if isinstance(size, int) else 64
