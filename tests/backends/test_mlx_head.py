"""The chunked head gives the losses and gradients of whole logits, for every kind of head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxsft.backends import mlx_head
from mlxsft.backends.mlx import MlxBackend, mx, nn
from mlxsft.backends.mlx_head import Head, chunked_losses, cross_entropy, summed_loss
from mlxsft.backends.mlx_intercept import intercepted
from mlxsft.data.batches import Batch
from mlxsft.models.source import ModelSource, open_model
from mlxsft.recipe_training import AdapterRecipe, TrainRecipe
from tests.backends.conftest import ADAPTER, make_batch, training
from tests.backends.test_mlx_training import largest_difference, run
from tests.tiny import write_llama


def pieces(rows: int = 7, vocabulary: int = 11) -> tuple[mx.array, mx.array, mx.array]:
    """Logits of several sizes, some of them extreme; targets; weights, one of them 0."""
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((rows, vocabulary)) * 10 ** rng.uniform(-1, 3, (rows, 1))).astype(np.float32)
    weights = np.ones(rows, dtype=np.float32)
    weights[2] = 0
    return mx.array(logits), mx.array(rng.integers(0, vocabulary, rows).astype(np.int32)), mx.array(weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_cross_entropy_and_its_gradient_are_mlx_own(smoothing: float) -> None:
    logits, targets, weights = pieces()

    def ours(logits: mx.array) -> mx.array:
        return (cross_entropy(logits, targets, smoothing) * weights).sum()

    def theirs(logits: mx.array) -> mx.array:
        return (nn.losses.cross_entropy(logits, targets, label_smoothing=smoothing) * weights).sum()

    (loss, slope), (expected, expected_slope) = mx.value_and_grad(ours)(logits), mx.value_and_grad(theirs)(logits)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(slope), np.array(expected_slope), atol=1e-6)


def test_a_loss_of_a_thousand_nats_is_finite() -> None:
    logits = mx.array([[1000.0, 0.0, -1000.0]])
    assert cross_entropy(logits, mx.array([2])).item() == 2000.0


@pytest.mark.parametrize("rows", [1, 3, 5, 8, 100])
def test_chunks_of_any_size_give_the_same(llama: ModelSource, rows: int) -> None:
    model = MlxBackend(llama).model
    head = Head(model, model.update)
    assert head.why_not() is None
    rng = np.random.default_rng(1)
    hidden = mx.array(rng.standard_normal((8, model.args.hidden_size)).astype(np.float32))
    targets, weights = mx.array(rng.integers(0, 256, 8).astype(np.int32)), mx.ones(8)

    def whole(hidden: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model.model.embed_tokens.as_linear(hidden), targets).sum()

    def chunked(hidden: mx.array) -> mx.array:
        return summed_loss(head, hidden, targets, weights, {}, smoothing=0.0)

    head.chunk_rows = rows
    (loss, slope), (expected, expected_slope) = mx.value_and_grad(chunked)(hidden), mx.value_and_grad(whole)(hidden)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    np.testing.assert_allclose(np.array(slope), np.array(expected_slope), atol=1e-6)
    assert chunked_losses(head, hidden, targets).sum().item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_twenty_updates_with_chunks_are_those_with_whole_logits(tmp_path: Path, tied: bool) -> None:
    folder = write_llama(tmp_path, tied=tied)
    chunked, whole = training(open_model(str(folder))), training(open_model(str(folder)))
    assert chunked._loss._head is not None
    chunked._loss._head.chunk_rows = 5
    whole._loss._head = None
    run(chunked, range(20), rate=1e-3)
    run(whole, range(20), rate=1e-3)
    one, other = chunked.adapter_state(), whole.adapter_state()
    drift = np.concatenate([np.abs(one[name] - other[name]).ravel() for name in one])
    assert drift.max() < 1e-6
    assert drift.mean() < 1e-7


def test_an_adapter_on_the_head_learns_from_every_chunk(tmp_path: Path) -> None:
    source = open_model(str(write_llama(tmp_path, tied=False)))
    adapter = ADAPTER.model_copy(update={"targets": ("q_proj", "lm_head")})
    chunked, whole = training(source, adapter), training(source, adapter)
    assert chunked._loss._head is not None
    chunked._loss._head.chunk_rows = 5
    whole._loss._head = None
    for backend in (chunked, whole):
        run(backend, range(20), rate=1e-3)
    assert any(name.startswith("lm_head") for name in chunked.adapter_state())
    assert largest_difference(chunked.adapter_state(), whole.adapter_state()) < 1e-6


def test_logits_of_the_whole_batch_never_exist(tmp_path: Path, peak_of: Callable[[Callable[[], object]], int]) -> None:
    """768 tokens with 32,000 logits each would be 98 MB in float32."""
    folder = write_llama(tmp_path, embeddings=32_000)
    batch = make_batch(rows=4, width=192, vocabulary=256)
    everything = Batch(batch.tokens, np.arange(192)[None].repeat(4, 0) > 0)
    backend = MlxBackend(open_model(str(folder)))
    backend.attach(AdapterRecipe(rank=2), 0)
    backend.optimize(TrainRecipe(steps=1))
    assert backend._loss._head is not None
    backend._loss._head.chunk_rows = 32
    peak = peak_of(lambda: backend.accumulate(everything))
    assert peak < 60e6
    backend._loss._head = None
    assert peak_of(lambda: backend.accumulate(everything)) > 190e6


class TwoHeads(nn.Module):
    """A model that calls its head twice: nothing that can be taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.layers: list[nn.Module] = []

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden = self.embed_tokens(tokens)
        return self.lm_head(hidden) + self.lm_head(2 * hidden)


def test_a_head_that_cannot_be_called_alone_is_found_out() -> None:
    assert Head(TwoHeads(), dict).why_not() == "its head is called 2 times"


class Pairs(nn.Module):
    """A model whose layers hand on two arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.layers = [Pair(), Pair()]

    def __call__(self, tokens: mx.array) -> mx.array:
        hidden, seen = self.embed_tokens(tokens), mx.array(1.0)
        for layer in self.layers:
            hidden, seen = layer(hidden, seen)
        return self.lm_head(hidden)


class Pair(nn.Module):
    """One of its layers, which counts how often any was called."""

    calls = 0

    def __call__(self, x: mx.array, seen: mx.array) -> tuple[mx.array, mx.array]:
        Pair.calls += 1
        return x * seen, seen + 1


def test_layers_are_not_called_for_logits_unless_the_model_needs_what_they_give(llama: ModelSource) -> None:
    hidden = mx.random.normal((3, 8), key=mx.random.key(0))
    pairs = Head(Pairs(), dict)
    assert pairs.why_not() is None
    before = Pair.calls
    np.testing.assert_allclose(np.array(pairs.logits(hidden)), np.array(pairs._model.lm_head(hidden)), rtol=1e-5)
    assert Pair.calls == before + 2
    model = MlxBackend(llama).model
    head, called = Head(model, model.update), []
    assert head.why_not() is None
    with intercepted(model.layers, lambda plain, *args, **kwargs: called.append(plain)):
        head.logits(mx.zeros((3, llama.config["hidden_size"])))
    assert not called


def test_chunks_have_the_stated_size(llama: ModelSource) -> None:
    model = MlxBackend(llama).model
    head = Head(model, model.update)
    head.why_not()
    assert head.chunk_rows * 4 * llama.config["vocab_size"] <= mlx_head.CHUNK_BYTES
