"""Attention in blocks: the same values and gradients, in memory that grows with the length and not with its square."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlxsft.backends import mlx_attention
from mlxsft.backends.mlx import mx
from mlxsft.backends.mlx_attention import economical_functions, in_blocks
from mlxsft.backends.mlx_models import mlx_lm
from mlxsft.backends.mlx_packing import Isolated
from tests.backends.test_mlx_training import Trainer, largest_difference, run


def random(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def masks(tokens: int) -> dict[str, Any]:
    back = np.arange(tokens)[:, None] - np.arange(tokens)
    window = (back >= 0) & (back < 5)
    segments = mx.array(np.repeat([1, 2, 3], [3, tokens - 8, 5])[None].repeat(2, 0))
    return {
        "causal": "causal",
        "everything": None,
        "window": mx.array(window),
        "added": mx.array(np.where(window, 0, -1e9).astype(np.float32)),
        "a key for all": mx.array(np.arange(tokens) < tokens - 2)[None, None, None],
        "packed": Isolated(segments).make_mask(tokens),
    }


@pytest.mark.parametrize("kind", list(masks(16)))
@pytest.mark.parametrize("tokens", [8, 13, 16])
def test_values_and_gradients_are_those_of_whole_attention(
    monkeypatch: pytest.MonkeyPatch, kind: str, tokens: int
) -> None:
    """Blocks of 4 queries, lengths that are and are not multiples of it, and two queries to a key."""
    monkeypatch.setattr(mlx_attention, "BLOCK", 4)
    mask, inputs = masks(tokens)[kind], (random(2, 4, tokens, 8), random(2, 2, tokens, 8), random(2, 2, tokens, 8))
    slope = random(2, 4, tokens, 8, seed=1)

    def whole(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask) * slope).sum()

    def blocks(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        return (in_blocks(q, k, v, 0.3, mask) * slope).sum()

    expected, gradients = mx.value_and_grad(whole, argnums=(0, 1, 2))(*inputs)
    value, ours = mx.value_and_grad(blocks, argnums=(0, 1, 2))(*inputs)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)  # terms of both signs add up
    for one, other in zip(ours, gradients, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-5)


def test_twenty_updates_are_those_with_whole_attention(monkeypatch: pytest.MonkeyPatch, trainer: Trainer) -> None:
    whole, blocks = trainer(), trainer()
    run(whole, range(20), rate=1e-3)
    monkeypatch.setattr(mlx_attention, "BLOCK", 4)
    run(blocks, range(20), rate=1e-3)
    assert largest_difference(whole.adapter_state(), blocks.adapter_state()) < 1e-6


def test_memory_grows_with_the_length(peak_of: Callable[[Callable[[], object]], int]) -> None:
    """Four times the length: whole attention takes 16 times the memory for its scores."""

    def gradient(tokens: int) -> Callable[[], object]:
        q, k, v = (random(1, 4, tokens, 16, seed=i) for i in range(3))
        slopes = mx.grad(lambda *x: in_blocks(*x, 0.25, "causal").sum(), argnums=(0, 1, 2))
        mx.eval(q, k, v)
        return lambda: mx.eval(slopes(q, k, v))

    short, long = peak_of(gradient(512)), peak_of(gradient(2048))
    assert long < 5 * short
    scores = 4 * 4 * 2048 * 2048
    assert long < scores


def failing() -> None:
    with economical_functions():
        raise KeyError


def test_it_is_there_for_a_while_only() -> None:
    llama, base = mlx_lm("models.llama"), mlx_lm("models.base")
    before = llama.scaled_dot_product_attention
    assert before is base.scaled_dot_product_attention
    with economical_functions():
        assert llama.scaled_dot_product_attention is not before
    with pytest.raises(KeyError):
        failing()
    assert llama.scaled_dot_product_attention is before
    assert base.scaled_dot_product_attention is before
