"""LoRA layers of our own: mlx-lm's, to rounding, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlxsft.backends.mlx import MlxBackend, mx, nn
from mlxsft.backends.mlx_lora import LowRankLinear
from mlxsft.backends.mlx_models import mlx_lm


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 7, 64), (1, 1, 64)])
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_mlx_lm(
    bits: int | None, bias: bool, shape: tuple[int, ...], training: bool
) -> None:
    theirs = lora(bits, bias, mx.float32)
    x = mx.random.normal(shape, key=mx.random.key(1))
    for one, other in zip(results(theirs, x), results(LowRankLinear(theirs).train(training), x), strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), atol=1e-6 * mx.abs(one).max().item())


@pytest.mark.parametrize("low_rank", [mx.float32, mx.bfloat16])
def test_half_precision_stays_as_it_is(low_rank: mx.Dtype) -> None:
    """A float32 change of a bfloat16 base gives bfloat16, as mlx-lm has it."""
    theirs = lora(None, True, mx.bfloat16)
    theirs.update({name: theirs[name].astype(low_rank) for name in ("lora_a", "lora_b")})
    x = mx.random.normal((2, 7, 64), key=mx.random.key(1)).astype(mx.bfloat16)
    for one, other in zip(results(theirs, x), results(LowRankLinear(theirs), x), strict=True):
        assert one.dtype == other.dtype
        one, other = (np.array(array.astype(mx.float32)) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=0.03, atol=0.03 * np.abs(one).max())


def test_a_model_gets_these_layers(trainer: Callable[..., MlxBackend]) -> None:
    layers = [module for module in trainer().model.modules() if "lora_a" in module]
    assert layers
    assert all(isinstance(layer, LowRankLinear) for layer in layers)


def test_dropout_acts_on_the_change_alone() -> None:
    theirs = lora(None, True, mx.float32)
    theirs.dropout = nn.Dropout(0.5)
    ours = LowRankLinear(theirs)
    x = mx.random.normal((2, 7, 64), key=mx.random.key(1))
    given = []
    for layer in (theirs, ours):
        mx.random.seed(3)
        given.append(layer.train()(x))
    np.testing.assert_allclose(np.array(given[0]), np.array(given[1]), rtol=1e-5, atol=1e-5)
    assert not mx.allclose(given[1], ours.eval()(x), atol=1e-3).item()


def lora(bits: int | None, bias: bool, dtype: mx.Dtype) -> nn.Module:
    """mlx-lm's layer, 64 to 96, with a change that is not zero."""
    mx.random.seed(0)
    linear = nn.Linear(64, 96, bias=bias)
    linear.set_dtype(dtype)
    base = nn.QuantizedLinear.from_linear(linear, 32, bits) if bits else linear
    layer = mlx_lm("tuner.lora").LoRALinear.from_base(base, r=4, scale=3.0)
    layer.lora_b = mx.random.normal((4, 96), key=mx.random.key(2))
    return layer


def results(layer: nn.Module, x: mx.array) -> list[mx.array]:
    """What a layer gives, and the gradients by its input and its two matrices."""
    weigh = mx.random.normal((*x.shape[:-1], 96), key=mx.random.key(4))

    def loss(x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        layer.lora_a, layer.lora_b = a, b
        return (layer(x) * weigh).astype(mx.float32).sum()

    a, b = layer.lora_a, layer.lora_b
    gradients = mx.grad(loss, argnums=(0, 1, 2))(x, a, b)
    layer.lora_a, layer.lora_b = a, b
    return [layer(x), *gradients]
