"""DoRA on MLX: mlx-lm's and PEFT's numbers, and the same on every number format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlxsft.backends.mlx import MlxBackend, mx, nn
from mlxsft.backends.mlx_dora import DoRAEmbedding, DoRALinear, dense_weight
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import leave_little_memory, losses_of, make_batch, quantized_llama, training

FORMATS = [
    *((bits, size, "affine") for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64)),
    *((4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")),
]
DORA = AdapterRecipe(kind="dora", rank=4, alpha=8.0)


def array(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def linear(bias: bool = False) -> nn.Linear:
    module = nn.Linear(64, 32, bias=bias)
    module.weight = array(32, 64, seed=1)
    if bias:
        module.bias = array(32, seed=2)
    return module


def learned(layer: Any) -> Any:
    """The layer with an adapter that does something."""
    a, b = layer.lora_a, layer.lora_b
    layer.lora_a, layer.lora_b = 0.3 * array(*a.shape, seed=3), 0.3 * array(*b.shape, seed=4)
    layer.m = layer.m * (1 + 0.1 * array(*layer.m.shape, seed=5))
    return layer


def linear_dora(base: nn.Module, rank: int = 4) -> Any:
    return DoRALinear(mlx_lm("tuner.lora").LoRALinear.from_base(base, r=rank, scale=2.0))


def embedding_dora(base: nn.Module, rank: int = 4) -> Any:
    return DoRAEmbedding(mlx_lm("tuner.lora").LoRAEmbedding.from_base(base, r=rank, scale=2.0))


def output_and_gradient(layer: Any, x: mx.array, method: str = "__call__") -> list[np.ndarray]:
    """The output, and the gradient of the sum of its squares by a, b, m."""

    def loss(a: mx.array, b: mx.array, m: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b, layer.m = a, b, m
        return mx.square(getattr(layer, method)(x)).sum()

    start = (layer.lora_a, layer.lora_b, layer.m)
    gradient = mx.grad(loss, argnums=(0, 1, 2))(*start)
    layer.lora_a, layer.lora_b, layer.m = start
    return [np.array(each) for each in (getattr(layer, method)(x), *gradient)]


def assert_close(one: list[np.ndarray], other: list[np.ndarray], tolerance: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max())


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_module_is_mlx_lms(bias: bool) -> None:
    ours, theirs = linear_dora(linear(bias)), mlx_lm("tuner.dora").DoRALinear.from_base(linear(bias), r=4, scale=2.0)
    x = array(5, 64, seed=6)
    np.testing.assert_allclose(np.array(ours(x)), np.array(linear(bias)(x)), rtol=1e-5, atol=1e-5)
    assert_close(output_and_gradient(learned(ours), x), output_and_gradient(learned(theirs), x), 1e-5)


@pytest.mark.parametrize("method", ["__call__", "as_linear"])
def test_an_embedding_is_mlx_lms(method: str) -> None:
    base = nn.Embedding(40, 64)
    base.weight = array(40, 64, seed=1)
    x = mx.array([[1, 5, 5], [39, 0, 2]]) if method == "__call__" else array(5, 64, seed=6)
    theirs = mlx_lm("tuner.dora").DoRAEmbedding.from_base(base, r=4, scale=2.0)
    ours = output_and_gradient(learned(embedding_dora(base)), x, method)
    assert_close(ours, output_and_gradient(learned(theirs), x, method), 1e-5)


@pytest.mark.parametrize(("bits", "group_size", "mode"), FORMATS)
def test_a_quantized_module_is_its_dequantized_one(bits: int, group_size: int, mode: str) -> None:
    packed = nn.QuantizedLinear.from_linear(linear(bias=True), group_size, bits, mode)
    dense = linear(bias=True)
    dense.weight = dense_weight(packed)
    x = array(5, 64, seed=6)
    ours, expected = learned(linear_dora(packed)), learned(linear_dora(dense))
    assert_close(output_and_gradient(ours, x), output_and_gradient(expected, x), 1e-4)
    table = nn.Embedding(32, 64)
    table.weight = array(32, 64, seed=1)
    packed_table = nn.QuantizedEmbedding.from_embedding(table, group_size, bits, mode)
    table.weight = dense_weight(packed_table)
    head = [output_and_gradient(learned(embedding_dora(each)), x, "as_linear") for each in (packed_table, table)]
    assert_close(*head, tolerance=1e-4)


def test_a_row_of_zeros_stays_finite() -> None:
    """Embeddings of unused tokens are often zero."""
    base = nn.Embedding(4, 8)
    base.weight = mx.zeros((4, 8))
    layer = embedding_dora(base)
    for method, x in (("__call__", mx.array([0, 1])), ("as_linear", array(2, 8))):
        assert all(np.isfinite(each).all() for each in output_and_gradient(layer, x, method))


@pytest.mark.parametrize(
    ("bits", "mode"),
    [(2, "affine"), (3, "affine"), (4, "affine"), (5, "affine"), (6, "affine"), (8, "affine"), (4, "mxfp4")],
)
def test_training_on_a_quantized_base_is_training_on_the_dequantized_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: int, mode: str
) -> None:
    source = quantized_llama(tmp_path, bits, mode, dtype="float32")
    dense = training(source, DORA, learned=False)
    expected = losses_of(dense)
    leave_little_memory(monkeypatch)
    packed = training(source, DORA, learned=False)
    assert "scales" in packed.model.layers[0].mlp.up_proj.linear
    found = losses_of(packed)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found[-1] < 0.95 * found[0]


def test_dora_begins_as_the_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_little_memory(monkeypatch)
    source = quantized_llama(tmp_path, 3, dtype="float32")
    batch, whole = make_batch(), AdapterRecipe(kind="dora", targets=("all-linear", "model.embed_tokens"))
    begun = training(source, whole, learned=False)
    np.testing.assert_allclose(begun.losses(batch), MlxBackend(source).losses(batch), rtol=1e-5, atol=1e-6)
