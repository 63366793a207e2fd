"""How much arithmetic tuning needs, told from the headers of a checkpoint and the shapes of an adapter."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from mlxsft.models.base_modules import base_matrices, unpacked_shape
from mlxsft.models.names import layer_of
from mlxsft.models.source import ModelSource

EXPERTS = re.compile(r"\.(experts|switch_mlp)\.")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN_COUNTS = ("num_experts_per_tok", "moe_k", "moe_topk")


def lora_operations(
    source: ModelSource, adapter: Mapping[str, tuple[int, ...]], rows: Iterable[tuple[int, int]]
) -> float:
    """Floating-point operations that LoRA needs for rows of (tokens, trained tokens), each once.

    `adapter` has the shapes of the adapter's tensors by mlx-lm's names. Forward, and backward without the slopes of the
    frozen weights: a matrix takes 2 operations a number and token, once forward and, from the lowest adapter up, once
    backward; LoRA's own three times; the head for trained tokens only; causal attention half of its square, forward and
    twice backward. Of experts, the chosen ones count. The last token of a row is not computed, nor is padding.
    """
    sized = [(tokens - 1, trained) for tokens, trained in rows]
    tokens, squares = sum(n for n, _ in sized), sum(n * n for n, _ in sized)
    frozen, trained = _frozen(source), _trained(source, adapter)
    lowest = min(trained, default=max(frozen, default=0) + 1)
    total = 4.0 * _head(source) * sum(trained_tokens for _, trained_tokens in sized)
    for layer, size in frozen.items():
        total += tokens * (2 * size * (2 if layer >= lowest else 1) + 6 * trained[layer])
        total += 2 * squares * _attention_width(source.config) * (3 if layer >= lowest else 1)
    return total


def _frozen(source: ModelSource) -> dict[int, float]:
    """By layer, the numbers of its matrices that are multiplied with a token."""
    sizes: dict[int, float] = defaultdict(float)
    for path, matrix in base_matrices(source).items():
        if place := layer_of(path):
            sizes[place[0]] += matrix.rows * matrix.columns
    for name in filter(EXPERTS.search, source.tensors):
        shape = unpacked_shape(source, name)
        if (place := layer_of(name)) and shape and len(shape) >= 2:
            sizes[place[0]] += math.prod(shape) * _chosen_share(source.config)
    return sizes


def _trained(source: ModelSource, adapter: Mapping[str, tuple[int, ...]]) -> dict[int, float]:
    """By layer, the numbers of the adapter's matrices that are multiplied with a token."""
    sizes: dict[int, float] = defaultdict(float)
    for name, shape in adapter.items():
        if (place := layer_of(name)) and len(shape) >= 2:
            share = _chosen_share(source.config) if EXPERTS.search(name) else 1.0
            sizes[place[0]] += math.prod(shape) * share
    return sizes


def _head(source: ModelSource) -> int:
    """The numbers of the output head: the largest matrix outside the layers, or an embedding that is as large."""
    matrices = base_matrices(source).items()
    return max((m.rows * m.columns for path, m in matrices if layer_of(path) is None), default=0)


def _chosen_share(config: Mapping[str, Any]) -> float:
    """The share of the experts that a token meets; all of them where config.json does not say."""
    chosen, count = _number(config, CHOSEN_COUNTS), _number(config, EXPERT_COUNTS)
    return min(1.0, chosen / count) if chosen and count else 1.0


def _attention_width(config: Mapping[str, Any]) -> int:
    """The columns of all heads together."""
    heads, head = _number(config, ("num_attention_heads", "n_head")), _number(config, ("head_dim",))
    return heads * head or _number(config, ("hidden_size", "n_embd", "d_model"))


def _number(config: Mapping[str, Any], names: Iterable[str]) -> int:
    """The first whole number that config.json has under one of these names, that of the text model first; or 0."""
    text_config = config.get("text_config")
    places = (text_config if isinstance(text_config, dict) else {}, config)
    found = (place.get(name) for place in places for name in names)
    return next((n for n in found if isinstance(n, int) and not isinstance(n, bool)), 0)
