"""What is random in training on MLX: noise of the size that NEFTune says, from seed, step and row alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from mlxsft.backends.initial_values import token_keys
from mlxsft.backends.mlx import MlxBackend, mx, nn
from mlxsft.backends.mlx_random import RandomKeys, noisy
from mlxsft.data.batches import Batch
from mlxsft.recipe_training import AdapterRecipe
from tests.backends.conftest import make_batch

Trainer = Callable[..., MlxBackend]


def test_noise_is_uniform_within_its_bound_and_for_a_while_only() -> None:
    embedding, tokens = nn.Embedding(10, 64), mx.array(np.arange(60).reshape(3, 20) % 10)
    plain, parameters = np.array(embedding(tokens)), embedding.parameters()
    keys = RandomKeys()
    keys.value = mx.array(token_keys(Batch(np.array(tokens), np.zeros((3, 20), bool)), 0, 1))
    bound = 5.0 / np.sqrt(20 * 64)
    with noisy(embedding, 5.0, keys, keys.number()):
        noise = np.array(embedding(tokens)) - plain
        again = np.array(embedding(tokens)) - plain
    assert 0.99 * bound < np.abs(noise).max() <= bound * (1 + 1e-5)
    assert noise.std() == pytest.approx(bound / np.sqrt(3), rel=0.05)
    assert abs(noise.mean()) < 0.02 * bound
    assert np.array_equal(again, noise)  # the same key
    assert np.array_equal(np.array(embedding(tokens)), plain)
    assert embedding.parameters().keys() == parameters.keys()


@pytest.mark.parametrize("targets", ["all-linear", ("all-linear", "model.embed_tokens")])
def test_noise_depends_on_seed_step_and_row_alone(trainer: Trainer, targets: object) -> None:
    adapter, batch = AdapterRecipe.model_validate({"rank": 2, "targets": targets}), make_batch()
    others = replace(batch, numbers=np.indices(batch.tokens.shape)[0] + 8)

    def losses(seed: int, **train: object) -> list[float]:
        backend = trainer(adapter, neftune_alpha=5.0, seed=seed, learned=False, **train)
        found = []
        for _ in range(2):
            found += [backend.accumulate(batch)[0], backend.accumulate(others)[0]]
            backend.losses(batch)
            mx.random.seed(len(found))
            backend.apply(0.0, None)
        return found

    once = losses(0)
    assert losses(0) == once
    assert losses(0, checkpoint_activations=True) == pytest.approx(once, rel=1e-6)
    assert len({*once, *losses(1)}) == 8


def test_validation_is_without_noise(trainer: Trainer) -> None:
    batch, plain, trained = make_batch(), trainer(), trainer(neftune_alpha=5.0)
    trained.accumulate(batch)
    assert np.array_equal(plain.losses(batch), trained.losses(batch))
    assert type(trained.model.model.embed_tokens) is nn.Embedding
