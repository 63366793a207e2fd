"""The same checkpoint and rows on PyTorch and on MLX: the same logits, losses, gradients and runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlxsft.backends.mlx import MlxBackend, mx
from mlxsft.backends.torch import TorchBackend
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from tests.backends.conftest import learned_adapter, make_batch, rows_of
from tests.backends.test_mlx_parity import save

ROUND = {"hidden_size": 64}  # mlx-lm rounds the root of it, by which Gemma multiplies, to bfloat16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-untied-grouped": ("llama", {}),
    "llama-tied-ungrouped": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {}),
    "gemma2": ("gemma2", ROUND | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("gemma3_text", ROUND | {"sliding_window": 8}),
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {"tie_word_embeddings": True}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 4.0, "embedding_multiplier": 3.0}),
    "smollm3": ("smollm3", {}),
}
KINDS = {
    "lora": AdapterRecipe(rank=4, alpha=8.0),
    "rslora": AdapterRecipe(rank=4, alpha=8.0, rslora=True),
    "dora": AdapterRecipe(kind="dora", rank=4, alpha=8.0),
    "pissa": AdapterRecipe(rank=4, alpha=8.0, init="pissa"),
    "full": AdapterRecipe(kind="full"),
}


@pytest.fixture(scope="session", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A random checkpoint of each architecture, as transformers saves it."""
    family, changes = MODELS[request.param]
    return open_model(str(save(tmp_path_factory.mktemp(request.param), family, {}, **changes)))


def both(source: ModelSource, adapter: AdapterRecipe, **train: Any) -> tuple[MlxBackend, TorchBackend]:
    """The two backends with the same learned adapter, about to train."""
    ours, theirs = MlxBackend(source), TorchBackend(source)
    recipe = TrainRecipe.model_validate({"steps": 20, **train})
    for backend in (ours, theirs):
        backend.attach(adapter, seed=3)
        backend.optimize(recipe)
    return ours, theirs


def close(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], tolerance: float) -> None:
    """Every tensor within a share of its length."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert np.linalg.norm(tensor - other[name]) <= tolerance * np.linalg.norm(tensor) + 1e-12, name


def test_logits_and_losses(model: ModelSource) -> None:
    ours, theirs, batch = MlxBackend(model), TorchBackend(model), make_batch()
    logits = np.array(ours.model(mx.array(batch.tokens)))
    with torch.no_grad():
        expected = theirs.model(torch.from_numpy(batch.tokens.astype(np.int64))).logits.numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours.losses(batch), theirs.losses(batch), rtol=1e-5, atol=1e-5)
    assert theirs.notes == []


def test_the_start_of_an_adapter(model: ModelSource) -> None:
    for adapter in (KINDS["lora"], KINDS["dora"], KINDS["full"]):
        ours, theirs = both(model, adapter)
        assert ours.adapter_config() == theirs.adapter_config()
        close(ours.adapter_state(), theirs.adapter_state(), 1e-6)
        assert ours.parameters() == theirs.parameters()
        assert ours.optimizer_state().keys() == theirs.optimizer_state().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(model: ModelSource, kind: str) -> None:
    """One step of plain descent at a rate of one, from an adapter that has learned."""
    ours, theirs = both(model, KINDS[kind], optimizer="sgd")
    start = learned_adapter(ours)
    for backend in (ours, theirs):
        backend.load_adapter_state(start)
    norms = []
    for backend in (ours, theirs):
        for part in rows_of(make_batch(), 4):
            backend.accumulate(part)
        norms.append(backend.apply(1.0, None))
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)
    steps = [{n: after - start[n] for n, after in backend.adapter_state().items()} for backend in (ours, theirs)]
    close(*steps, 1e-4)


def trajectory(backend: MlxBackend | TorchBackend, steps: int, begin: int = 0) -> list[float]:
    """The loss of each step of a run."""
    losses = []
    for step in range(begin, begin + steps):
        sums = [backend.accumulate(part) for part in rows_of(make_batch(seed=step), 4)]
        losses.append(sum(s for s, _ in sums) / sum(n for _, n in sums))
        backend.apply(2e-4, 1.0)
    return losses


def test_a_run_of_twenty_steps(model: ModelSource) -> None:
    ours, theirs = both(model, KINDS["lora"])
    np.testing.assert_allclose(trajectory(ours, 20), trajectory(theirs, 20), rtol=1e-4)
    close(ours.adapter_state(), theirs.adapter_state(), 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_every_kind_and_optimizer_goes_on_on_the_other_backend(llama: ModelSource, kind: str) -> None:
    for optimizer in ("adamw", "adafactor", "muon", "lion"):
        ours, theirs = both(llama, KINDS[kind], optimizer=optimizer)
        losses = trajectory(ours, 4)
        np.testing.assert_allclose(trajectory(theirs, 2), losses[:2], rtol=1e-4)
        resumed, _ = both(llama, KINDS[kind], optimizer=optimizer)
        resumed.load_adapter_state(theirs.adapter_state())
        resumed.load_optimizer_state(theirs.optimizer_state())
        np.testing.assert_allclose(trajectory(resumed, 2, begin=2), losses[2:], rtol=1e-4)
        loaded = TorchBackend(llama)
        loaded.attach_saved(ours.adapter_config(), ours.adapter_state())
        np.testing.assert_allclose(loaded.losses(make_batch()), ours.losses(make_batch()), rtol=1e-5, atol=1e-5)


def test_the_adapter_of_a_tied_embedding_is_in_the_head_too(llama: ModelSource) -> None:
    adapter = AdapterRecipe(rank=4, alpha=8.0, targets=("q_proj", "model.embed_tokens"))
    ours, theirs = both(llama, adapter)
    np.testing.assert_allclose(trajectory(ours, 6), trajectory(theirs, 6), rtol=1e-4)
    close(ours.adapter_state(), theirs.adapter_state(), 1e-3)


@pytest.mark.parametrize("name", ["stories260k-llama", "tinystories-656k-llama", "tinystories-656k-llama-original"])
def test_real_models(real: Path, name: str) -> None:
    ours, theirs = both(open_model(str(real / "models" / name)), KINDS["lora"])
    batch = make_batch(width=64)
    np.testing.assert_allclose(ours.losses(batch), theirs.losses(batch), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(trajectory(ours, 20), trajectory(theirs, 20), rtol=1e-4)
    # Not tensor by tensor: of small gradients behind a sharp attention, float32 has no more than 2e-3 right.
    close({"": flat(ours.adapter_state())}, {"": flat(theirs.adapter_state())}, 1e-3)


def flat(state: Mapping[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([state[name].ravel() for name in sorted(state)])
