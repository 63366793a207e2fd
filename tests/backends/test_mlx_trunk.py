"""Frozen lower layers: what they give can be kept, and their memory given back."""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest

from mlxsft.backends.adapters import frozen_layers
from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.mlx_trunk import from_numpy, to_numpy
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import make_batch, rows_of, training
from tests.tiny import write_llama

UPPER = AdapterRecipe(rank=4, alpha=8.0, layers=2)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random Llama of five layers."""
    return open_model(str(write_llama(tmp_path_factory.mktemp("deep"), layers=5)))


@pytest.mark.parametrize("way", ["buckets", "in a new process's cache"])
def test_twenty_updates_with_the_trunk_kept_are_those_without(deep: ModelSource, way: str) -> None:
    plain, kept = training(deep, UPPER), training(deep, UPPER)
    assert kept.trunk_layers() == 3
    if way != "buckets":
        kept.release_trunk()
    for step in range(20):
        batch = make_batch(seed=step)
        plain.accumulate(batch)
        for part in rows_of(batch, 4):
            kept.accumulate(replace(part, trunk=kept.trunk(part)))
        plain.apply(1e-3, 1.0)
        kept.apply(1e-3, 1.0)
    one, other = plain.adapter_state(), kept.adapter_state()
    drift = np.concatenate([np.abs(one[name] - other[name]).ravel() for name in one])
    assert drift.max() < 1e-5  # of values that moved by up to 0.016
    assert drift.mean() < 1e-7


def test_released_layers_take_no_memory_until_an_answer_needs_them(deep: ModelSource) -> None:
    backend = training(deep, UPPER)
    batch = make_batch()
    expected = backend.losses(batch)
    given = replace(batch, trunk=backend.trunk(batch))
    layer = sum(array.nbytes for _, array in _arrays(backend, 0))
    gc.collect()  # what the differentiated functions of an update hold on to, here and below
    full = mx.get_active_memory()
    backend.release_trunk()
    assert full - mx.get_active_memory() >= 3 * layer
    backend.accumulate(given)
    np.testing.assert_allclose(backend.losses(given), expected, rtol=1e-5)
    gc.collect()
    assert full - mx.get_active_memory() > 2 * layer  # training on what is kept read nothing
    np.testing.assert_array_equal(backend.losses(batch), expected)
    assert full - mx.get_active_memory() < layer


def test_bfloat16_goes_through_numpy_bit_for_bit() -> None:
    values = mx.array([1.0, -0.0, 3.14159, 1e30, float("inf")]).astype(mx.bfloat16)
    stored = to_numpy(values)
    assert stored.dtype == np.uint16
    assert mx.array_equal(from_numpy(stored), values).item()
    assert to_numpy(mx.ones(2, dtype=mx.float16)).dtype == np.float16


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["model.layers.11.mlp.up_proj.lora_a", "model.layers.7.self_attn.q_proj.lora_b"], 7),
        (["transformer.h.3.attn.c_attn.lora_a"], 3),
        (["model.layers.4.mlp.up_proj.lora_a", "lm_head.lora_a"], 4),
        (["model.layers.4.mlp.up_proj.lora_a", "model.embed_tokens.lora_a"], 0),
        (["model.layers.0.mlp.up_proj.lora_a"], 0),
        (["lm_head.lora_a"], 0),
        ([], 0),
    ],
)
def test_what_lies_below_the_trained_tensors(names: list[str], layers: int) -> None:
    assert frozen_layers(names, ("lm_head.",)) == layers


def _arrays(backend: MlxBackend, layer: int) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return list(tree_flatten(backend.model.layers[layer].parameters()))
