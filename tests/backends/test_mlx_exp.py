"""Exponentials of our own: exact to float32, and the gates and weights made of them those of MLX."""

from __future__ import annotations

import numpy as np
import pytest

from mlxsft.backends import mlx_exp
from mlxsft.backends.mlx import mx, nn


def test_the_exponential_is_exact_to_float32() -> None:
    x = np.linspace(-87, 88, 1_000_001).astype(np.float32)
    error = np.abs(np.array(mlx_exp.exp(mx.array(x))) / np.exp(x.astype(np.float64)) - 1)
    assert (error <= 8e-7 + 6e-8 * np.abs(x)).all()


@pytest.mark.parametrize("x", [-1e30, -1000.0, -88.0, -1e-30, 0.0, 1e-30, 88.0, 1000.0, 1e30])
def test_extreme_values_stay_finite(x: float) -> None:
    value = mlx_exp.exp(mx.array([x])).item()
    assert value == pytest.approx(float(np.exp(np.clip(np.float64(x), -87.3365, 88.0297))), rel=1e-5)


def test_what_is_not_a_number_stays_so() -> None:
    assert np.isnan(mlx_exp.softmax(mx.array([[0.0, float("nan")]]))).all()


@pytest.mark.parametrize("shape", [(3, 7), (2, 3, 4, 50), (1500, 300)])
def test_the_softmax_and_its_slope_are_mlx_own(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, slope = (mx.array((5 * rng.standard_normal(shape)).astype(np.float32)) for _ in range(2))
    ours, ours_slope = mx.value_and_grad(lambda x: (mlx_exp.softmax(x) * slope).sum())(x)
    theirs, theirs_slope = mx.value_and_grad(lambda x: (mx.softmax(x, axis=-1) * slope).sum())(x)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-4, abs=1e-4)
    np.testing.assert_allclose(np.array(ours_slope), np.array(theirs_slope), atol=1e-5)
    np.testing.assert_allclose(np.array(mlx_exp.softmax(x).sum(axis=-1)), 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [(3, 8), (2000, 300)])
def test_the_gate_and_its_slopes_are_mlx_own(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    gate, x, slope = (mx.array((4 * rng.standard_normal(shape)).astype(np.float32)) for _ in range(3))
    _, ours = mx.value_and_grad(lambda g, x: (mlx_exp.swiglu(g, x) * slope).sum(), argnums=(0, 1))(gate, x)
    _, theirs = mx.value_and_grad(lambda g, x: (nn.silu(g) * x * slope).sum(), argnums=(0, 1))(gate, x)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(np.array(one), np.array(other), rtol=1e-4, atol=2e-4)
    np.testing.assert_allclose(np.array(mlx_exp.swiglu(gate, x)), np.array(nn.silu(gate) * x), rtol=1e-5, atol=1e-5)
