"""How much arithmetic tuning needs, beside numbers that were counted by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mlxsft.models.headers import TensorInfo
from mlxsft.models.operations import lora_operations
from mlxsft.models.source import open_model
from tests.tiny import write_llama

WIDTH, INNER, KEYS = 32, 64, 16  # of a tiny Llama
LAYER = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * INNER  # numbers in the matrices of a layer
ROWS = [(11, 4), (6, 5)]  # (tokens, trained tokens)
TOKENS, SQUARES, TRAINED = 15, 125, 9  # without the last of each row
Q_PROJ = {"model.layers.1.self_attn.q_proj.lora_a": (WIDTH, 4), "model.layers.1.self_attn.q_proj.lora_b": (4, WIDTH)}


def head_operations(vocabulary: int) -> int:
    return 4 * vocabulary * WIDTH * TRAINED


def test_layers_below_the_adapter_are_computed_forward_only(tiny_llama: Path) -> None:
    source = open_model(str(tiny_llama))
    assert source.embedding_rows is not None
    below = 2 * LAYER * TOKENS + 2 * WIDTH * SQUARES
    above = 2 * 2 * LAYER * TOKENS + 3 * 2 * WIDTH * SQUARES + 6 * (2 * 4 * WIDTH) * TOKENS
    assert lora_operations(source, Q_PROJ, ROWS) == below + above + head_operations(source.embedding_rows)


def test_heads_may_have_more_columns_than_the_model(tiny_llama: Path) -> None:
    source = open_model(str(tiny_llama))
    wide = replace(source, config={**source.config, "head_dim": 16})  # four heads
    more = lora_operations(wide, Q_PROJ, ROWS) - lora_operations(source, Q_PROJ, ROWS)
    assert more == (1 + 3) * 2 * (64 - WIDTH) * SQUARES


def test_an_untied_head_counts_once(tmp_path: Path, tiny_llama: Path) -> None:
    untied = open_model(str(write_llama(tmp_path / "untied", tied=False)))
    assert lora_operations(untied, Q_PROJ, ROWS) == lora_operations(open_model(str(tiny_llama)), Q_PROJ, ROWS)


def test_a_quantized_model_needs_the_same(tiny_llama: Path) -> None:
    source, tensors = open_model(str(tiny_llama)), {}
    for name, info in source.tensors.items():
        tensors[name] = info
        if len(info.shape) == 2:  # as MLX stores 4 bits: eight numbers in one of 32
            rows, columns = info.shape
            tensors[name] = replace(info, dtype="U32", shape=(rows, columns // 8))
            tensors[name.replace(".weight", ".scales")] = replace(info, shape=(rows, columns // 32))
    quantized = replace(
        source, tensors=tensors, config={**source.config, "quantization": {"group_size": 32, "bits": 4}}
    )
    assert lora_operations(quantized, Q_PROJ, ROWS) == lora_operations(source, Q_PROJ, ROWS)


@pytest.mark.parametrize("stacked", [False, True])
def test_of_experts_the_chosen_ones_count(tiny_llama: Path, stacked: bool) -> None:
    source = open_model(str(tiny_llama))
    shapes = (
        {"model.layers.1.mlp.switch_mlp.up_proj.weight": (8, INNER, WIDTH)}
        if stacked
        else {f"model.layers.1.mlp.experts.{i}.up_proj.weight": (INNER, WIDTH) for i in range(8)}
    )
    experts = {name: TensorInfo("model.safetensors", "F32", shape) for name, shape in shapes.items()}
    config = {**source.config, "num_experts": 8, "num_experts_per_tok": 2}
    mixture = replace(source, tensors={**source.tensors, **experts}, config=config)
    more = lora_operations(mixture, Q_PROJ, ROWS) - lora_operations(source, Q_PROJ, ROWS)
    assert more == 2 * 2 * (2 * INNER * WIDTH) * TOKENS
